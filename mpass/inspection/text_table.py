"""Text tables, and what they are printed on."""

from __future__ import annotations

import io
import sys
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table


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
