"""The size of a window, from the classified terms of a mask: causal, or as far ahead as back."""

from __future__ import annotations

from collections.abc import Sequence

import sympy

from mpass.graph.site import Length
from mpass.graph.sizes import agree
from mpass.masks.conjuncts import MaskSizes, MaskTerms, at_most
from mpass.masks.emitter import as_length
from mpass.masks.expressions import NotUnderstood


def window_both_ways(terms: MaskTerms, sizes: MaskSizes, like: Sequence[Length]) -> int | None:
    """Size of a window that reaches as far ahead as back; 0 if it hides nothing; None if causal.

    Where there are as many queries as keys, `k <= q + w` is no prefix of cached keys but the
    window's other side.
    """
    back, ahead = terms.width, terms.offset
    if ahead is None or back is None or not (ahead.is_Integer and back.is_Integer):
        return None
    if ahead <= 0 or back <= 0:
        return None
    lengths = [as_length(size, like) for size in (sizes.queries, sizes.keys)]
    if lengths[0] is None or lengths[1] is None or not agree(lengths[0], lengths[1]):
        return None
    if at_most(sizes.keys, back) and at_most(sizes.keys, ahead + 1):
        return 0
    if back != ahead + 1:
        raise NotUnderstood(
            f"window of {back - 1} keys back and {ahead} ahead: they must be as many"
        )
    return int(back)


def window_size(terms: MaskTerms, sizes: MaskSizes) -> int:
    """Size of the sliding window, the query's own position included; 0 if it hides nothing."""
    width = terms.width
    assert width is not None
    if at_most(sizes.queries, width):
        return 0
    if terms.offset is None:
        raise NotUnderstood(f"sliding window without causality: q - k < {width}")
    window = width + terms.offset
    if not isinstance(window, sympy.Integer):
        raise NotUnderstood(f"sliding window of {window} is not a constant")
    if window < 1:
        raise NotUnderstood(f"sliding window of {window} hides every key")
    return int(window)
