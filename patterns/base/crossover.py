"""Whether to estimate an index at all: what can be decided before a pattern's estimator runs."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.crossover import EstimatedWork, PatternWork
from mpass.lowering.device import REFERENCE, Lowering
from mpass.lowering.dispatch import choose_lowering, device_lowering, reason_against
from mpass.lowering.index import AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.patterns.base.pattern import Pattern
from mpass.patterns.base.work import pattern_work


@dataclass(frozen=True, slots=True, eq=False)
class HeadPatterns:
    """The patterns of the heads of one op, all of one class, and the width of their index.

    Compared by identity, so that they are cheap keys: `mpass.patterns.base.patterns_of` makes one
    per set of arguments.
    """

    patterns: tuple[Pattern, ...]
    width: IndexWidth


def reason_for_dense(
    inputs: EstimateInputs,
    own: HeadPatterns,
    *,
    dense_above: float,
    min_seq_len: int,
    site: int = 0,
) -> str:
    """Why dense attention will run whatever these heads select, in words; "" to estimate.

    own: the patterns of the op's heads. The answer is read from sizes alone. Where the lowering of
    the device decides by cost, the pattern's least work and the estimator's measured cost count,
    unless `dense_above` is 1 or more; elsewhere what earlier calls of the site selected does.
    """
    query, key, mask, num_keys = inputs.query, inputs.key, inputs.mask, inputs.num_keys
    if num_keys < min_seq_len:
        return f"{num_keys} keys, sparse from {min_seq_len} on"
    if dense_above >= 1.0:
        return ""
    lowering = choose_lowering(inputs.attention())
    unserved = reason_against(inputs.attention()) if lowering is REFERENCE else ""
    if unserved:
        return unserved
    if not device_lowering(query.device).decides_by_cost:
        name = type(own.patterns[0]).name if own.patterns else ""
        return lowering.begin_call(inputs.attention(), name, parts_of(own), site, dense_above)
    plain = mask.causal and mask.window == 0 and mask.query_offset == 0
    if not plain:
        return ""
    heads = query.shape[0] * len(own.patterns)
    if query.shape[2] != num_keys or heads * num_keys == 0:
        return ""
    return decide(
        lowering,
        own,
        query.dtype,
        query.shape[3],
        heads,
        max(1, heads * key.shape[1] // query.shape[1]),
        num_keys,
        dense_above,
    )


@functools.lru_cache(maxsize=4096)
def parts_of(own: HeadPatterns) -> tuple[PatternWork, ...]:
    """The patterns of an op in the words of lowerings."""
    return tuple(pattern_work(pattern, count) for pattern, count in Counter(own.patterns).items())


@functools.lru_cache(maxsize=4096)
def decide(
    lowering: Lowering,
    own: HeadPatterns,
    dtype: torch.dtype,
    head_dim: int,
    heads: int,
    kv_heads: int,
    length: int,
    dense_above: float,
) -> str:
    """`reason_for_dense` by what the patterns compute at least, and by what estimating costs."""
    counts = Counter(own.patterns)
    share = sum(p.min_density(length) * n for p, n in counts.items()) / len(own.patterns)
    names = ", ".join(pattern.in_words() for pattern in counts)
    if share > dense_above:
        return f"{names} computes {share:.0%} of the work or more, dense above {dense_above:.0%}"
    usual = counts.most_common(1)[0][0]

    def estimate(query: Tensor, key: Tensor) -> SparseIndex:
        timed = [usual] * query.shape[1]
        heads, scale = range(len(timed)), query.shape[3] ** -0.5
        inputs = EstimateInputs(query, key, AttentionMask(), heads, scale)
        return type(usual).estimate(inputs, timed)

    exact = all(pattern.fixed_budget for pattern in own.patterns)
    work = EstimatedWork(
        dtype, head_dim, head_dim, heads, kv_heads, length, share, exact, str(usual), estimate
    )
    if lowering.estimation_worthwhile(work):
        return ""
    return f"estimating {names} over {length} keys does not pay here"
