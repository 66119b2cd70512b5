"""`mpass check`: whether a pattern of one's own does what it says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, STANDARD_OUTPUT, as_json_text, check_output, deliver
from mpass.files import write_whole


def check(
    pattern: Annotated[
        str,
        typer.Argument(
            help="FILE.py:Class, which is run, or the name of a pattern.",
            autocompletion=prompt.starting(prompt.PATTERNS),
        ),
    ],
    as_json: AS_JSON = False,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Save here: a picture for .svg, else JSON; - is standard output.",
        ),
    ] = None,
) -> None:
    """Hold a pattern's index, kernels and cost against what it says that it selects, and draw it.

    Ends with status 1 if anything is wrong.
    """
    check_output(output)
    from mpass.inspection.draw import as_svg, as_text
    from mpass.inspection.pattern_check import check_pattern, load_pattern, picture_of

    cls = load_pattern(pattern)
    done = []
    for found in check_pattern(cls):
        done.append(found)
        line = f"{found.pattern}, {found.what}: {found.fault or 'right'}"
        typer.echo(line, err=as_json or output == STANDARD_OUTPUT)
    wrong = [found for found in done if found.fault]
    picture = picture_of(cls)

    def data() -> list[dict[str, str]]:
        return [dataclasses.asdict(found) for found in done]

    def shown() -> str:
        counted = f"{len(done)} checks, {len(wrong)} wrong"
        return counted if picture is None else f"{counted}\n\n{as_text(picture)}"

    def save(file: Path) -> None:
        drawn = as_svg([picture]) if picture is not None and file.suffix == ".svg" else ""
        write_whole(file, drawn or as_json_text(data()))

    deliver(data, shown, output=output, as_json=as_json, save=save)
    if wrong:
        raise typer.Exit(1)
