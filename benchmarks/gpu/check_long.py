"""Long layers against the truth, at some query blocks: what short checks cannot meet.

Lengths beyond one chunk of every kernel, offsets beyond 32 bits, rows with tens of thousands of
keys: the truth is fp64 attention over exactly the cells that the index selects.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.gpu.check import poisoned_memory, relative_error
from benchmarks.gpu.layer import Estimator
from benchmarks.gpu.setting import Row, Setting
from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex, num_query_blocks
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.triton import LOWERING as lowering

CHECKED_BLOCKS = 8
"""Query blocks that are compared: the first, the last and some between."""

RELATIVE = 1e-2
"""Largest norm of the error over the norm of the truth, of any head and query block in bf16."""


def check_long(setting: Setting, length: int, estimate: Estimator) -> Row:
    """Estimation and attention of a long layer, its outputs poisoned first, twice.

    error: the largest relative error of a head and query block; repeats: whether a second run gives
    the same bits.
    """
    query, key, value = setting.tensors(length)
    mask, scale = AttentionMask(), query.shape[-1] ** -0.5
    inputs = AttentionInputs(query, key, value, mask, scale)
    runs = []
    for _ in range(2):
        with poisoned_memory():
            index = estimate(query, key)
            runs.append((index, lowering.sparse_attention(inputs, index)))
    (index, out), (_, again) = runs
    blocks = num_query_blocks(length, 0)
    picked = sorted({round(i * (blocks - 1) / (CHECKED_BLOCKS - 1)) for i in range(CHECKED_BLOCKS)})
    error = max(block_error(inputs, index, out, block) for block in picked)
    repeats = bool(torch.equal(out, again))
    return {"error": error, "repeats": repeats, "ok": error < RELATIVE and repeats}


def block_error(inputs: AttentionInputs, index: SparseIndex, out: Tensor, block: int) -> float:
    """The largest relative error of a head in one block of BLOCK queries."""
    length = inputs.query.shape[2]
    rows = slice(block * BLOCK, min(length, (block + 1) * BLOCK))
    stop = rows.stop  # causal: no key after these rows counts
    visible = reference.visible_rows(index, inputs.mask, rows, batch=1, num_keys=length)
    group = inputs.query.shape[1] // inputs.key.shape[1]
    error = 0.0
    for head in range(inputs.query.shape[1]):
        query = inputs.query[0, head, rows].double()
        keys = inputs.key[0, head // group, :stop].double()
        values = inputs.value[0, head // group, :stop].double()
        scores = query @ keys.T * inputs.scale
        truth = reference.masked_softmax(scores[None, None], visible[:, head : head + 1, :, :stop])
        truth = truth[0, 0] @ values
        error = max(error, relative_error(out[0, head, rows], truth))
    return error
