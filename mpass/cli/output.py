"""Where the result of a command goes, alike in all of them.

`--json` prints JSON instead of tables. `-o FILE` also saves what the command makes, and `-o -`
writes that to standard output alone. Progress and notes go to standard error.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType

from mpass.errors import OptionValueError
from mpass.files import check_writable, write_whole

STANDARD_OUTPUT = Path("-")

AS_JSON = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]
OUTPUT = Annotated[
    Path | None,
    typer.Option(
        "--output",
        "-o",
        metavar="FILE",
        help="Save here: a page for .html, else JSON; - is standard output.",
    ),
]
JSON_OUTPUT = Annotated[
    Path | None,
    typer.Option("--output", "-o", metavar="FILE", help="Save JSON here; - is standard output."),
]


def check_output(output: Path | None, option: str = "output") -> None:
    """Refuse a file that cannot be written before anything runs."""
    if output is None or output == STANDARD_OUTPUT:
        return
    if output.is_dir() or not output.absolute().parent.is_dir():
        raise OptionValueError(option, str(output), "a file in a folder that exists")
    try:
        check_writable(output)
    except OSError as error:
        allowed = f"a file that can be written ({error.strerror})"
        raise OptionValueError(option, str(output), allowed) from None


def check_folder(folder: Path | None, option: str) -> None:
    """Make a folder before anything runs, and refuse one that cannot be made or written."""
    if folder is None:
        return
    try:
        folder.mkdir(parents=True, exist_ok=True)
        check_writable(folder / "file")
    except OSError as error:
        allowed = f"a folder that can be written ({error.strerror})"
        raise OptionValueError(option, str(folder), allowed) from None


def as_json_text(data: object) -> str:
    """JSON as commands print and save it."""
    return json.dumps(data, indent=2, ensure_ascii=False, default=str) + "\n"


def deliver(
    data: Callable[[], Any],
    shown: Callable[[], RenderableType | str],
    *,
    output: Path | None,
    as_json: bool,
    save: Callable[[Path], object] | None = None,
    content: Callable[[], str] | None = None,
) -> None:
    """Print a result and save it.

    data: the result for JSON. shown: the tables that are printed without `--json`. save: writes the
    file of `-o FILE`; content: its text, where that is no JSON of `data`.
    """
    text = content or (lambda: as_json_text(data()))
    if output == STANDARD_OUTPUT:
        typer.echo(text(), nl=False)
        return
    if as_json:
        typer.echo(as_json_text(data()), nl=False)
    else:
        table = shown()
        if isinstance(table, str):
            typer.echo(table)
        else:
            Console().print(table)
    if output is None:
        return
    if save is not None:
        save(output)
    else:
        write_whole(output, text())
    typer.echo(f"Saved to {output}", err=as_json)
