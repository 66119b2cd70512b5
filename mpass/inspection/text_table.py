"""Text tables, and what they are printed on."""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from mpass.config.pattern_text import short_form
from mpass.config.spans import in_spans


def patterns_of_heads(patterns: Sequence[str]) -> str:
    """`vertical_slash(slash_size=512)` where all heads have it, else with the heads of each.

    `a_shape heads 0-3, 6; dense heads 4-5`: fields by name, those at their defaults left out.
    """
    heads: dict[str, list[int]] = {}
    for head, pattern in enumerate(patterns):
        heads.setdefault(pattern, []).append(head)
    if len(heads) == 1:
        return short_form(next(iter(heads)))
    return "; ".join(
        f"{short_form(pattern)} head{'s' * (len(own) > 1)} {in_spans(own)}"
        for pattern, own in heads.items()
    )


def open_console() -> Console:
    """A console on stdout: as wide as the terminal, 120 columns in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)


def render(table: Table, width: int = 120) -> str:
    """A rich table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True).print(table)
    return buffer.getvalue()
