"""Text tables, and what they are printed on."""

from __future__ import annotations

import html
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


def as_html(table: Table | None, lines: Sequence[str]) -> str:
    """A table and the lines below it for a notebook; all text is escaped.

    table: None for lines alone.
    """
    parts = []
    if table is not None and table.row_count:
        columns = table.columns
        parts.append("<table><thead><tr>")
        parts += [f"<th>{html.escape(str(column.header))}</th>" for column in columns]
        parts.append("</tr></thead><tbody>")
        for cells in zip(*(list(column.cells) for column in columns), strict=True):
            inner = "".join(f"<td>{in_cell(str(cell))}</td>" for cell in cells)
            parts.append(f"<tr>{inner}</tr>")
        parts.append("</tbody></table>")
    parts += [f"<p>{html.escape(line)}</p>" for line in lines]
    return "".join(parts)


def in_cell(text: str) -> str:
    """Text with its line breaks."""
    return html.escape(text).replace("\n", "<br>")


def open_console() -> Console:
    """A console on stdout: as wide as the terminal, 120 columns in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)


def render(table: Table, width: int = 120) -> str:
    """A rich table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True).print(table)
    return buffer.getvalue()
