"""Blocks of largest mean-pooled score, by generated kernels.

The meaning stands in mpass.lowering.reference.block_sparse. Letters: h heads asked for.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpass.lowering.index import BLOCK, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_sparse import BlockSparseRule, block_sparse_width
from mpass.lowering.triton.launch import device_ints
from mpass.lowering.triton.list_blocks import (
    ListRule,
    empty_lists,
    group_by_kind,
    list_blocks,
    numbers_of,
    score_chunks,
)
from mpass.lowering.triton.pooled_keys import kernel_inputs, pooled_means


def block_sparse_index(inputs: EstimateInputs, rules: Sequence[BlockSparseRule]) -> SparseIndex:
    """As mpass.lowering.reference.block_sparse; heads of one block size are taken together."""
    inputs = kernel_inputs(inputs)
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    index = empty_lists(inputs, block_sparse_width(rules))
    for size, places in group_by_kind([rule.block_size for rule in rules]):
        count = len(places)
        picked = [heads[i] for i in places]
        lists = [ListRule(i, max(1, rules[i].top_k)) for i in places]
        ints = device_ints(
            [*picked, *(head // inputs.group for head in picked), *numbers_of(lists)], query.device
        )
        head_of, kv_of, rule_ints = ints.split([count, count, 8 * count])
        pooled_query, _ = pooled_means(
            query, head_of, size, mask, offset=mask.query_offset, dtype=torch.float32
        )
        pooled_key, _ = pooled_means(key, kv_of, size, mask, dtype=torch.float32)
        pooled_key = pooled_key.transpose(-1, -2)
        repeat = size // BLOCK
        first_tile = inputs.first_block // repeat
        for start, stop in score_chunks(index, mask, count, pooled_key.shape[-1], repeat):
            first = (inputs.first_block + start) // repeat - first_tile
            last = (inputs.first_block + stop - 1) // repeat - first_tile
            list_blocks(
                index,
                pooled_query[:, :, first : last + 1] @ pooled_key,
                "top_k",
                rule_ints,
                inputs,
                rows=(start, stop),
                first_score_row=first + first_tile,
                repeat=repeat,
            )
    return index
