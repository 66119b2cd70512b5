"""The evaluation's figures as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group
from rich.table import Table

from mpass.evaluate.summary import Summary, judge


def render_summaries(summaries: Sequence[Summary]) -> Group:
    """Retrieval, losses and a verdict per pattern, each where there is something to show."""
    ordered = sorted(summaries, key=lambda item: (item.length, item.pattern, item.task, item.text))
    retrieval = [item for item in ordered if item.last_quarter is None]
    losses = [item for item in ordered if item.last_quarter is not None]
    tables = []
    if retrieval:
        tables.append(retrieval_table(retrieval))
    if losses:
        tables.append(loss_table(losses))
    return Group(*tables, verdict_table(ordered))


def retrieval_table(summaries: Sequence[Summary]) -> Table:
    """Tasks that the dense model cannot do are in brackets, and do not count."""
    table = Table(
        "task",
        "length",
        "pattern",
        "density",
        "strict: dense",
        "sparse",
        "after dense decoding: dense",
        "sparse",
        title="retrieval",
        title_justify="left",
    )
    for item in summaries:
        shares = (item.dense, item.score, item.dense_loose, item.loose)
        cells = ["" if share is None else f"{share:.0%}" for share in shares]
        if not item.counted:
            cells = [f"({cell})" if cell else "" for cell in cells]
        table.add_row(item.task, str(item.length), item.pattern, f"{item.density:.1%}", *cells)
    return table


def loss_table(summaries: Sequence[Summary]) -> Table:
    """Increase of the loss over dense, and how far the predictions moved."""
    table = Table(
        "text",
        "task",
        "length",
        "pattern",
        "density",
        "dense, nats",
        "sparse",
        "last quarter",
        "divergence",
        "agreement",
        title="nats per token",
        title_justify="left",
    )
    for item in summaries:
        table.add_row(
            item.text,
            item.task,
            str(item.length),
            item.pattern,
            f"{item.density:.1%}",
            f"{item.dense:.3f}",
            f"{item.score:+.4f}",
            f"{item.last_quarter:+.4f}",
            f"{item.divergence:.4f}",
            f"{item.agreement:.1%}",
        )
    return table


def verdict_table(summaries: Sequence[Summary]) -> Table:
    """The gates of a default; a cell is empty where nothing was measured."""
    table = Table(
        "pattern",
        "density",
        "worst loss",
        "worst last quarter",
        "least retention",
        "both gates",
        title="all of it",
        title_justify="left",
    )
    for verdict in judge(summaries):
        measured = None not in (verdict.loss, verdict.retention)
        table.add_row(
            verdict.pattern,
            f"{verdict.density:.1%}",
            "" if verdict.loss is None else f"{verdict.loss:+.4f}",
            "" if verdict.last_quarter is None else f"{verdict.last_quarter:+.4f}",
            "" if verdict.retention is None else f"{verdict.retention:.0%}",
            ("passes" if verdict.passes else "fails") if measured else "",
        )
    return table
