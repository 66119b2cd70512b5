"""Dense attention on a CPU: torch's own, or the generated kernel on every tile if that is faster.

Which one that is, and up to which density sparse is faster than both, comes from the measured
constants of cost.py.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from mpass.lowering.cpu.attention import sparse_attention
from mpass.lowering.cpu.cost_constants import estimator_constants, machine_constants
from mpass.lowering.cpu.cost_model import crossover_density, predict
from mpass.lowering.crossover import EstimatedWork
from mpass.lowering.index import (
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    num_query_blocks,
    whole_index,
)
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import dense


def dense_attention(inputs: AttentionInputs) -> Tensor:
    """Softmax attention over all keys that the mask allows; as mpass.lowering.reference.dense.

    With a bias by distance that is the kernel: torch's own would need the bias of every pair.
    """
    query, mask = inputs.query, inputs.mask
    plain = mask.window == 0 and mask.key_mask is None
    plain = plain and inputs.softcap == 0 and inputs.sink_logits is None
    two_sided = not mask.causal and mask.window == 0
    biased = inputs.distance_bias is not None
    if not biased and (two_sided or (plain and not kernel_is_faster(*sizes(inputs)))):
        return dense.dense_attention(inputs)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    return sparse_attention(inputs, all_tiles(query.shape[0], query.shape[1], rows))


@functools.lru_cache(maxsize=256)
def all_tiles(batch: int, heads: int, num_blocks: int) -> SparseIndex:
    """The index of all that a mask allows, made once: short prompts would notice."""
    sizes = torch.empty(batch, heads, 0, 0, device="cpu")
    return whole_index(sizes, num_blocks, IndexWidth(), diagonal_slots(heads))


def breakeven_density(inputs: AttentionInputs) -> float:
    """Share of the dense work up to which the sparse kernel is no slower than torch's own."""
    return breakeven_density_of(*sizes(inputs))


LEAST_RATIO = 0.97
"""Of dense over sparse time: what an estimation that turns out to be useless may cost at most,"""

GAIN_RATIO = 8
"""unless what it saves at best is that many times its cost."""


def estimation_worthwhile(work: EstimatedWork) -> bool:
    """Whether estimating an index and using it can be faster than dense attention.

    At best the index computes `work.min_density`. What it will compute is known only after paying
    for it, so that the price must be small besides: a share of dense attention that nobody misses,
    or of what there is to gain.
    """
    constants = machine_constants(work.dtype, work.head_dim, work.value_dim)
    size = {"length": work.length, "heads": work.heads, "kv_heads": work.kv_heads}
    whole = predict(constants, density=1.0, **size)
    dense = min(whole.dense, whole.sparse)
    attention = predict(constants, density=work.min_density, **size).sparse
    gain = dense - attention
    if gain <= 0:
        return False
    estimation = estimator_constants(
        work.name, work.dtype, work.head_dim, work.heads // work.kv_heads, work.estimate
    ).seconds(work.length, work.heads)
    if work.exact:
        return estimation < gain
    return estimation < gain and estimation <= max(
        whole.dense / LEAST_RATIO - dense, gain / GAIN_RATIO
    )


def sizes(inputs: AttentionInputs) -> tuple[torch.dtype, int, int, int, int, int, bool]:
    """What the costs depend on: dtype, head_dim, value dim, heads, kv heads, keys, 8-bit scores."""
    query, key, value = inputs.query, inputs.key, inputs.value
    return (
        query.dtype,
        query.shape[3],
        value.shape[3],
        query.shape[1],
        key.shape[1],
        key.shape[2],
        inputs.int8,
    )


@functools.lru_cache(maxsize=4096)
def kernel_is_faster(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    heads: int,
    kv_heads: int,
    length: int,
    int8: bool = False,
) -> bool:
    """Whether the generated kernel beats torch's attention at torch's own work."""
    constants = machine_constants(dtype, head_dim, value_dim, int8)
    cost = predict(constants, length=length, heads=heads, kv_heads=kv_heads, density=1.0)
    return cost.sparse < cost.dense


@functools.lru_cache(maxsize=4096)
def breakeven_density_of(
    dtype: torch.dtype,
    head_dim: int,
    value_dim: int,
    heads: int,
    kv_heads: int,
    length: int,
    int8: bool = False,
) -> float:
    """`crossover_density` of this machine, once per size."""
    constants = machine_constants(dtype, head_dim, value_dim, int8)
    return crossover_density(constants, length=length, heads=heads, kv_heads=kv_heads)
