"""The command line. torch is imported inside of the commands, which start at once without it."""

from __future__ import annotations

import dataclasses
import logging
import os
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from mpass import __version__
from mpass.cli.calibrate import calibrate
from mpass.cli.check import check
from mpass.cli.coverage import coverage
from mpass.cli.draw import draw
from mpass.cli.env import env
from mpass.cli.evaluate import evaluate
from mpass.cli.explain import explain
from mpass.cli.profile import profile
from mpass.cli.progress import steps, waiting
from mpass.cli.prompt import check_output
from mpass.errors import MpassError
from mpass.models.texts import TEXTS

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

TEXT_HELP = "Text of the prompt: a UTF-8 file, or " + ", ".join(
    f"{text.name} ({text.title}; {text.license})" for text in TEXTS.values()
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


@app.command()
def demo(
    model: Annotated[
        str,
        typer.Option(help="smollm2, gemma3, a folder in transformers' format, or a GGUF file."),
    ] = "smollm2",
    text: Annotated[str, typer.Option(help=TEXT_HELP)] = next(iter(TEXTS)),
    length: Annotated[int, typer.Option(help="Tokens of the prompt.")] = 8192,
    pattern: Annotated[
        str | None,
        typer.Option(
            help="Sparse pattern of every head: NAME or 'NAME(1000, 512)'; see `mpass patterns`. "
            "The backend's default if not given."
        ),
    ] = None,
    config: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A pattern per layer and head: JSON of a SparseConfig."),
    ] = None,
    dtype: Annotated[str, typer.Option(help="bf16, fp16 or fp32.")] = "bf16",
    device: Annotated[str, typer.Option(help="cpu or cuda.")] = "cpu",
    repeats: Annotated[int, typer.Option(help="Timed prefills of each kind, interleaved.")] = 3,
    new_tokens: Annotated[int, typer.Option(help="Tokens that each generates.")] = 16,
    min_seq_len: Annotated[
        int | None, typer.Option(help="Prompts shorter than this stay dense.")
    ] = None,
    inner_backend: Annotated[
        str,
        typer.Option(help="What compiles the rest of the graph: inductor, aot_eager or eager."),
    ] = "inductor",
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Save the figures there.")
    ] = None,
) -> None:
    """Run one long prompt through a real model, dense and sparse, and compare.

    Prints the attention sites that were rewritten, the density that was really computed, prefill
    seconds, the text's perplexity, how often the next-token predictions agree, and the words that
    each generates.
    """
    check_output(json_file, "json")
    # transformers warns that generation leaves the model's positions: 8192 and a few tokens do.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    with waiting("Starting"):  # importing torch and transformers takes seconds
        from mpass.evaluate.demo import DemoSettings, check_settings, render, run_demo

        settings = DemoSettings(
            model=model,
            text=text,
            length=length,
            pattern=pattern,
            config=config,
            dtype=dtype,
            device=device,
            repeats=repeats,
            new_tokens=new_tokens,
            min_seq_len=min_seq_len,
            inner_backend=inner_backend,
        )
        check_settings(settings)
    with steps(settings.steps) as on_progress:
        result = run_demo(settings, on_progress)
    Console().print(render(result))
    if json_file is not None:
        result.write(json_file)
        typer.echo(f"Saved to {json_file}")


@app.command()
def patterns() -> None:
    """List the sparse patterns with their parameters."""
    from rich.table import Table

    from mpass.patterns.base import registered_patterns

    table = Table("pattern", "parameters and their defaults", "which keys a query looks at")
    for name, cls in sorted(registered_patterns().items()):
        fields = ", ".join(f"{field.name}={field.default}" for field in dataclasses.fields(cls))
        table.add_row(name, fields, escape((cls.__doc__ or "").strip().split("\n")[0]))
    Console().print(table)


app.command("eval")(evaluate)
for command in (calibrate, check, coverage, draw, env, explain, profile):
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
