"""The evaluation's figures as tables."""

from __future__ import annotations

from collections.abc import Sequence

from rich.box import SIMPLE
from rich.console import Group
from rich.table import Table

from mpass.evaluate.plan import SLIDING
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


def make_table(title: str, *columns: str) -> Table:
    """A table of 80 characters in which only patterns are broken into lines."""
    table = Table(title=title, title_justify="left", box=SIMPLE, padding=(0, 1, 0, 0))
    for column in columns:
        if column == "pattern":
            table.add_column(column, min_width=14, overflow="fold")
        else:
            table.add_column(column, no_wrap=True)
    return table


def retrieval_table(summaries: Sequence[Summary]) -> Table:
    """Tasks that the dense model cannot do are in brackets, and do not count."""
    table = make_table(
        "Answers found, dense -> sparse: strictly, and after dense decoding",
        *("task", "tokens", "pattern", "density", "strict", "decoded"),
    )
    for item in summaries:
        cells = []
        for dense, sparse in ((item.dense, item.score), (item.dense_loose, item.loose)):
            cell = "" if dense is None else f"{dense:.0%} -> {sparse:.0%}"
            cells.append(cell if item.counted or not cell else f"({cell})")
        table.add_row(item.task, str(item.length), item.pattern, f"{item.density:.1%}", *cells)
    return table


def loss_table(summaries: Sequence[Summary]) -> Table:
    """Increase of the loss over dense, and how far the predictions moved."""
    table = make_table(
        "Nats per token: dense, and what sparse adds; predictions beside dense",
        *("text", "tokens", "pattern", "density", "dense", "sparse", "last 1/4", "KL", "agree"),
    )
    for item in summaries:
        table.add_row(
            f"{item.text}, sliding" if item.task == SLIDING else item.text,
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
    table = make_table(
        "The worst of it", "pattern", "density", "loss", "last 1/4", "retention", "both gates"
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
