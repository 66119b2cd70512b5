"""How commands show that they are at work: on standard error, beside the results, never in them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console


def progress_console() -> Console:
    """Where progress is drawn."""
    return Console(file=sys.stderr)


@contextmanager
def waiting(message: str) -> Iterator[None]:
    """A spinner while the block runs, if someone is watching."""
    console = progress_console()
    if not console.is_terminal:
        yield
        return
    with console.status(message):
        yield


@contextmanager
def steps(total: int) -> Iterator[Callable[[str], None]]:
    """A function that starts the next of `total` steps; a bar on a terminal, else a line each."""
    console = progress_console()
    if not console.is_terminal:
        yield lambda message: console.print(message, soft_wrap=True, markup=False, highlight=False)
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    columns = (
        SpinnerColumn(),
        BarColumn(bar_width=20),
        TimeElapsedColumn(),
        TextColumn("{task.description}", markup=False),
    )
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("", total=total)
        started = 0

        def on_progress(message: str) -> None:
            nonlocal started
            progress.update(task, description=message, completed=started)
            started += 1

        yield on_progress
