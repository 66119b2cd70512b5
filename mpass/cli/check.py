"""`mpass check`: whether a pattern of one's own does what it says."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated

import typer


def check(
    pattern: Annotated[
        str, typer.Argument(help="FILE.py:Class, which is run, or the name of a pattern.")
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of lines.")] = False,
) -> None:
    """Hold a pattern's index, kernels and cost against what it says that it selects.

    Ends with status 1 if anything is wrong.
    """
    from mpass.inspection.pattern_check import check_pattern, load_pattern

    done = []
    for found in check_pattern(load_pattern(pattern)):
        done.append(found)
        if not as_json:
            typer.echo(f"{found.pattern}, {found.what}: {found.fault or 'right'}")
    if as_json:
        typer.echo(json.dumps([dataclasses.asdict(found) for found in done], indent=2))
    if any(found.fault for found in done):
        raise typer.Exit(1)
