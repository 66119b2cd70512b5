"""The command line. torch is imported inside of the commands, which start at once without it."""

from __future__ import annotations

import logging
import sys
import warnings
from typing import Annotated

import typer

from mpass import __version__
from mpass.cli.calibrate import calibrate
from mpass.cli.check import check
from mpass.cli.coverage import coverage
from mpass.cli.demo import demo
from mpass.cli.doctor import doctor
from mpass.cli.draw import draw
from mpass.cli.env import env
from mpass.cli.evaluate import evaluate
from mpass.cli.explain import explain
from mpass.cli.patterns import patterns
from mpass.cli.profile import profile
from mpass.cli.serve import PASSED_ON, serve
from mpass.errors import MpassError

app = typer.Typer(
    name="mpass",
    no_args_is_help=True,
    add_completion=True,
    rich_markup_mode="markdown",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Sparse attention prefill as a torch.compile backend: "
    'torch.compile(model, backend="minference").',
)

EXTRAS = ("transformers", "gguf", "accelerate")
"""Packages that commands need and that come with an extra."""


def show_version(wanted: bool) -> None:
    """Print the version and leave."""
    if wanted:
        typer.echo(f"mpass {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=show_version, is_eager=True, help="Show the version."),
    ] = False,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what each compile does.")
    ] = False,
) -> None:
    """Options before the command."""
    if verbose:
        logging.basicConfig(format="%(name)s: %(message)s")
        logging.getLogger("mpass").setLevel(logging.INFO)


COMMANDS = (demo, explain, doctor, profile, calibrate, coverage, patterns, draw, check, env)

about_patterns = typer.Typer(
    no_args_is_help=True,
    help="List, draw and check patterns; these are commands of their own, too.",
)
about_patterns.command("list")(patterns)
about_patterns.command()(draw)
about_patterns.command()(check)

app.add_typer(about_patterns, name="pattern")
app.command("eval")(evaluate)
app.command(context_settings=PASSED_ON)(serve)
for command in COMMANDS:
    app.command()(command)


def user_error(error: BaseException) -> MpassError | None:
    """The refusal behind an exception: Dynamo wraps what a backend raises."""
    inner = getattr(error, "inner_exception", None)
    for candidate in (error, inner, error.__cause__):
        if isinstance(candidate, MpassError):
            return candidate
    return None


def system_refusal(error: Exception) -> str | None:
    """What is missing or forbidden outside of mpass, in one line, or None for a fault of ours."""
    if isinstance(error, ModuleNotFoundError) and error.name in EXTRAS:
        return f"{error.name} is not installed; pip install 'mpass[models]' brings it"
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return None


def main() -> None:
    """Entry point of the console script; refusals are one line and exit status 2."""
    # torch warns so where numpy, which nothing here needs, is not installed.
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    try:
        app()
    except Exception as error:
        refusal = user_error(error) or system_refusal(error)
        if refusal is None:
            raise
        typer.echo(f"mpass: {refusal}", err=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
