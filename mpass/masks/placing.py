"""Where a mask stands among batch and heads: its dimensions named b, h, q, k, also when folded.

Scores that are not [B, H, Nq, Nk] have other leading sizes, of [B*H, Nq, Nk] or [.., H, Nq, Nk]:
an index along them is one of batch and head, in row-major order.
"""

from __future__ import annotations

import sympy
from torch import fx

from mpass.graph.nodes import example, shape_of
from mpass.graph.site import Length
from mpass.graph.sizes import agree
from mpass.masks.conjuncts import MaskSizes
from mpass.masks.elements import is_one
from mpass.masks.expressions import (
    BATCH,
    HEAD,
    KEY,
    QUERY,
    Expr,
    NotUnderstood,
    axis,
    number,
    substitute,
)
from mpass.masks.rules.views import reshape_map

INDICES = (BATCH, HEAD, QUERY, KEY)

Leading = tuple[Length, ...]
"""Sizes that stand before the queries and keys of scores that are not [B, H, Nq, Nk]."""


def named(leading: Leading | None) -> tuple[Expr, ...] | None:
    """Leading sizes as what can be compared without a guard."""
    return None if leading is None else tuple(map(number, leading))


def mask_misfit(mask: fx.Node, query: fx.Node, key: fx.Node, leading: Leading | None = None) -> str:
    """Why a mask does not broadcast to the scores in every call; "" if it does, by guards."""
    shape = example(mask).shape
    before = shape_of(query)[:2] if leading is None else leading
    full = (*before, shape_of(query)[2], shape_of(key)[2])
    if len(shape) > len(full):
        return f"mask {mask} has {len(shape)} dimensions"
    for size, whole in zip(shape, full[len(full) - len(shape) :], strict=True):
        if not is_one(size) and not agree(size, whole):
            return f"mask {mask} of shape {tuple(shape)} does not fit the scores"
    return ""


def rename(
    condition: Expr, rank: int, sizes: MaskSizes, leading: Leading | None = None
) -> Expr | str:
    """Name the axes of a mask of some rank as b, h, q, k; or why that cannot be done."""
    if leading is None:
        return substitute(condition, {axis(i): INDICES[4 - rank + i] for i in range(rank)})
    first = len(leading) + 2 - rank
    aligned = substitute(condition, {axis(i): axis(i + first) for i in range(rank)})
    rows = axis(0)
    if len(leading) == 1 and sizes.heads != 1:
        # The row b * H + h of [B*H, ..]: what divides by H names the batch, the rest the head.
        own = {sympy.floor(rows / sizes.heads): BATCH, sympy.Mod(rows, sizes.heads): HEAD}
        aligned = aligned.xreplace(own)
    try:
        new = [int(size) if size.is_Integer else size for size in (sizes.batch, sizes.heads)]
        names = reshape_map(leading, new)
    except NotUnderstood as reason:
        return f"mask is not proven: {reason}"
    both = {axis(0): BATCH, axis(1): HEAD}
    replacement = {old: new.xreplace(both) for old, new in names.items()}
    replacement |= {axis(len(leading)): QUERY, axis(len(leading) + 1): KEY}
    return substitute(aligned, replacement)
