"""What to do about a head, in words: from its density, its recall and where mass was lost."""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.patterns.base import Lost, Pattern, registered_patterns

LOW_RECALL = 0.95
"""Below this share of the exact attention a head deserves a word."""

SPARE_RECALL = 0.995
"""Above this a smaller budget may do, if the head computes more than `SPARE_DENSITY`."""

SPARE_DENSITY = 0.3
MORE = 8
"""Key blocks or block diagonals whose gain is quoted."""


def advise(
    pattern: str,
    recall: float,
    density: float,
    lost_by_distance: Tensor,
    lost_by_block: Tensor,
    *,
    dense_reason: str = "",
) -> str:
    """A suggestion for one head, "" if there is nothing to improve.

    pattern: as text; recall and density: of the selected keys; lost_by_distance, lost_by_block:
    fp64 [J], mass lost per query by block distance and by key block; dense_reason: why
    dense attention ran instead, "" where it did not.
    """
    name = pattern.split("(")[0]
    if dense_reason:
        return f"dense attention ran: {dense_reason}"
    if recall >= LOW_RECALL:
        if name != "dense" and density > 0.98:
            return "it selects nearly every key: a smaller budget, or dense in the config"
        if name != "dense" and recall >= SPARE_RECALL and density > SPARE_DENSITY:
            return f"keeps {recall:.1%} with {density:.0%} of the keys: a smaller budget may do"
        return ""
    columns, diagonals = gain(lost_by_block), gain(lost_by_distance)
    kind: Lost = "slash" if diagonals >= columns else "vertical"
    best = max(diagonals, columns)
    lost = 1.0 - recall
    cls = registered_patterns().get(name, Pattern)
    if best < 0.25 * lost:
        budget = cls.budget_hint("spread") or "block_sparse fits such a head better"
        hint = f"the lost mass is spread out: {budget}, or dense"
    elif budget := cls.budget_hint(kind):
        hint = f"{budget}: the {MORE} best {places(kind)} hold {best:.1%}"
    else:
        hint = f"vertical_slash would find the {MORE} {places(kind)} that hold {best:.1%}"
    return f"loses {lost:.1%} of the attention; {hint}"


def gain(lost: Tensor) -> float:
    """Mass that the MORE largest entries hold."""
    return float(torch.topk(lost, min(MORE, len(lost))).values.sum())


def places(kind: Lost) -> str:
    """What a budget of that kind buys."""
    return "block diagonals" if kind == "slash" else "key blocks"
