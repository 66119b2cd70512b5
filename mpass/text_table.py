"""Reports as text tables."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from mpass.report import Report


def render_report(report: Report) -> str:
    """A table of the sites of a report, one row each, with the summary below."""
    table = Table(title=None)
    for column in ("layer", "module", "heads", "kv", "dim", "status", "patterns or reason", "from"):
        table.add_column(column)
    for site in report.sites:
        table.add_row(
            str(site.layer) if site.layer >= 0 else "-",
            site.path or "-",
            str(site.num_heads),
            str(site.num_kv_heads),
            str(site.head_dim),
            site.status,
            site.reason or count_patterns(site.patterns),
            site.config_source or "-",
        )
    return render(table) + report.summary()


def count_patterns(patterns: Sequence[str]) -> str:
    """`9 x vertical_slash(1000, 1024), 2 x dense()`."""
    counts = Counter(patterns)
    return ", ".join(f"{count} x {pattern}" for pattern, count in counts.most_common())


def open_console() -> Console:
    """A console on stdout: as wide as the terminal, 120 columns in a file or a pipe."""
    return Console(width=None if sys.stdout.isatty() else 120)


def render(table: Table, width: int = 120) -> str:
    """A rich table as plain text."""
    buffer = io.StringIO()
    Console(file=buffer, width=width, no_color=True).print(table)
    return buffer.getvalue()
