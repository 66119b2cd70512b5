"""What a lowering is told of a layer's patterns, so that it can predict what they cost."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Sequence

import torch

from mpass.lowering.crossover import WORK_LENGTHS, LayerWork, PatternWork
from mpass.patterns.base.pattern import Pattern


@functools.lru_cache(maxsize=4096)
def pattern_work(pattern: Pattern, heads: int) -> PatternWork:
    """One pattern in the words of lowerings, for some heads of a layer."""
    estimator = getattr(pattern, "estimator", None)
    scored = not pattern.input_independent
    name = estimator.name if estimator else pattern.name if scored else ""
    return PatternWork(
        heads=heads,
        name=str(pattern),
        estimator=name,
        rule=pattern.rule() if hasattr(pattern, "rule") else pattern,
        densities=tuple(pattern.usual_density(length) for length in WORK_LENGTHS),
        exact=pattern.fixed_budget,
        per_kv_head=pattern.per_kv_head(),
    )


def layer_work(
    patterns: Sequence[Pattern],
    *,
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    kv_heads: int,
    causal: bool = True,
    window: int = 0,
    replayed: bool = False,
) -> LayerWork:
    """A layer in the words of lowerings.

    patterns: one per query head; window: in tokens, 0 for none; replayed: in a CUDA graph.
    """
    counts = Counter(patterns)
    parts = tuple(pattern_work(pattern, count) for pattern, count in counts.items())
    return LayerWork(dtype, head_dim, value_dim, kv_heads, parts, causal, window, replayed)
