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

        step = ""

        def on_progress(message: str) -> None:
            nonlocal started, step
            step = message
            progress.update(task, description=step, completed=started)
            started += 1

        def on_compiling(text: str) -> None:
            progress.update(task, description=f"{step} ({text})" if text else step)

        with compiling_told_to(on_compiling):
            yield on_progress


@contextmanager
def compiling_told_to(watcher: Callable[[str], None]) -> Iterator[None]:
    """In the block `watcher` is told what is being compiled, in place of a line of its own."""
    from mpass.lowering.activity import activity  # with torch, which is there by then

    with activity().show_by(watcher):
        yield
