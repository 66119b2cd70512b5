"""`mpass check`: whether a pattern of one's own does what it says."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import typer

from mpass.cli import prompt
from mpass.cli.output import AS_JSON, JSON_OUTPUT, check_output, deliver


def check(
    pattern: Annotated[
        str,
        typer.Argument(
            help="FILE.py:Class, which is run, or the name of a pattern.",
            autocompletion=prompt.starting(prompt.PATTERNS),
        ),
    ],
    as_json: AS_JSON = False,
    output: JSON_OUTPUT = None,
) -> None:
    """Hold a pattern's index, kernels and cost against what it says that it selects.

    Ends with status 1 if anything is wrong.
    """
    check_output(output)
    from mpass.inspection.pattern_check import check_pattern, load_pattern

    done = []
    for found in check_pattern(load_pattern(pattern)):
        done.append(found)
        line = f"{found.pattern}, {found.what}: {found.fault or 'right'}"
        typer.echo(line, err=as_json or output is not None)
    wrong = [found for found in done if found.fault]
    deliver(
        lambda: [dataclasses.asdict(found) for found in done],
        lambda: f"{len(done)} checks, {len(wrong)} wrong",
        output=output,
        as_json=as_json,
    )
    if wrong:
        raise typer.Exit(1)
