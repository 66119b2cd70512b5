"""The evaluation's figures as a table."""

from __future__ import annotations

from collections.abc import Iterable

from rich.table import Table

from mpass.evaluate.run import PERPLEXITY, Summary


def render_summaries(summaries: Iterable[Summary]) -> Table:
    """A row per task, length and pattern; tasks that the dense model cannot do are in brackets."""
    table = Table("task", "length", "pattern", "density", "dense", "sparse")
    for item in sorted(summaries, key=lambda item: (item.length, item.pattern, item.task)):
        if item.task == PERPLEXITY:
            dense, sparse = f"{item.dense:.3f} nats", f"{item.score:+.4f} nats"
        else:
            dense, sparse = f"{item.dense:.0%}", f"{item.score:.0%}"
            if not item.counted:
                dense, sparse = f"({dense})", f"({sparse})"
        table.add_row(
            item.task, str(item.length), item.pattern, f"{item.density:.1%}", dense, sparse
        )
    return table
