"""A calibration as a table and as a picture: layer by head, colour by pattern, shade by cost."""

from __future__ import annotations

from collections import Counter
from html import escape

from rich.table import Table

from mpass.calibration.outcome import Calibration

COLOURS = ("#4e79a7", "#e15759", "#59a14f", "#f28e2b", "#b07aa1", "#76b7b2", "#9c755f", "#edc948")
"""Of patterns, in the order of their names."""

CELL = 18
"""Pixels of a head's square."""


def choice_table(outcome: Calibration) -> Table:
    """Every candidate: how many heads took it, and what it would cost and lose in all of them."""
    table = Table("pattern", "heads", "cost", "predicted loss", "recall", title="candidates")
    taken = Counter(outcome.chosen.flatten().tolist())
    cost = outcome.costs.sum((0, 1)) / outcome.dense_seconds
    loss = outcome.losses.sum((0, 1))
    recall = outcome.recalls.mean((0, 1))
    for i in sorted(range(len(outcome.candidates)), key=lambda i: -taken[i]):
        table.add_row(
            str(outcome.candidates[i]),
            str(taken[i] or "-"),
            f"{float(cost[i]):.1%}",
            f"{float(loss[i]):.4f}",
            f"{float(recall[i]):.4f}",
        )
    chosen = outcome.chosen[..., None]
    table.add_section()
    table.add_row(
        "searched",
        str(outcome.chosen.numel()),
        f"{outcome.chosen_seconds / outcome.dense_seconds:.1%}",
        f"{float(outcome.losses.gather(2, chosen).sum()):.4f}",
        f"{float(outcome.recalls.gather(2, chosen).mean()):.4f}",
    )
    return table


def check_table(outcome: Calibration) -> Table:
    """The held-out inputs, longer ones below; increases and times are beside those of dense.

    Lengths that no text of the search had are marked.
    """
    names = ("input", "tokens", "with", "attention", "loss", "increase", "divergence", "found")
    table = Table(*names, title="held-out inputs (+: longer than any text of the search)")
    for check in sorted(outcome.checks, key=lambda check: check["length"]):
        for name, run in check.items():
            if not isinstance(run, dict):
                continue
            table.add_row(
                check["kind"],
                f"{check['length']}{'+' if check['longer'] else ''}",
                name,
                f"{run['seconds'] / max(1e-9, check['dense']['seconds']):.1%}",
                f"{run['loss']:.4f}",
                "" if name == "dense" else f"{run['loss'] - check['dense']['loss']:+.4f}",
                f"{run['divergence']:.4f}" if "divergence" in run else "",
                f"{run['found']:.0%}" if "found" in run else "",
            )
    return table


def heatmap(outcome: Calibration) -> str:
    """An SVG: a row per layer, a square per head; the fuller the colour, the dearer the head."""
    names = sorted({candidate.name for candidate in outcome.candidates})
    colours = {name: COLOURS[i % len(COLOURS)] for i, name in enumerate(names)}
    layers, heads = outcome.chosen.shape
    per_head = outcome.dense_seconds / (layers * heads)
    left, top = 40, 24
    parts = []
    for row, layer in enumerate(outcome.layers):
        y = top + row * CELL
        parts.append(f'<text x="{left - 6}" y="{y + 13}" text-anchor="end">{layer}</text>')
        for head in range(heads):
            candidate = int(outcome.chosen[row, head])
            pattern = outcome.candidates[candidate]
            cost = float(outcome.costs[row, head, candidate]) / per_head
            parts.append(
                f'<rect x="{left + head * CELL}" y="{y}" width="{CELL - 1}" height="{CELL - 1}" '
                f'fill="{colours[pattern.name]}" fill-opacity="{0.2 + 0.8 * min(1.0, cost):.2f}">'
                f"<title>layer {layer}, head {head}: {escape(str(pattern))}, {cost:.0%} of dense"
                "</title></rect>"
            )
    used = sorted({outcome.candidates[int(i)].name for i in outcome.chosen.flatten()})
    bottom = top + layers * CELL + 8
    for i, name in enumerate(used):
        y = bottom + i * CELL
        parts.append(
            f'<rect x="{left}" y="{y}" width="{CELL - 4}" height="{CELL - 4}" '
            f'fill="{colours[name]}"/><text x="{left + CELL}" y="{y + 12}">{escape(name)}</text>'
        )
    width = max(left + heads * CELL + 12, 220)
    height = bottom + len(used) * CELL + 8
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11">'
        f'<text x="{left}" y="14">layer by head; full colour: as dear as dense</text>'
        f"{''.join(parts)}</svg>\n"
    )
