"""Blocks of largest mean-pooled score, by generated kernels.

The meaning stands in mpass.lowering.reference.block_sparse; pooled queries and keys are rounded to
the inputs' dtype, their products are fp32. Letters: B batch, h heads asked for, J key blocks, D
head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_sparse import BlockSparseRule, block_sparse_width
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, target_for
from mpass.lowering.triton.list_blocks import (
    ListRule,
    empty_lists,
    group_by_kind,
    list_blocks,
    numbers_of,
    score_chunks,
)
from mpass.lowering.triton.pooled_keys import kernel_inputs, pooled_means
from mpass.lowering.triton.spec import TritonKernelSpec, score_warps


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
            query, head_of, size, mask, offset=mask.query_offset, dtype=query.dtype
        )
        pooled_key, _ = pooled_means(key, kv_of, size, mask, dtype=key.dtype)
        repeat = size // BLOCK
        first_tile = inputs.first_block // repeat
        for start, stop in score_chunks(index, mask, count, pooled_key.shape[2], repeat):
            first = (inputs.first_block + start) // repeat - first_tile
            last = (inputs.first_block + stop - 1) // repeat - first_tile
            list_blocks(
                index,
                block_products(pooled_query, pooled_key, mask, (first, last + 1), first_tile, size),
                "top_k",
                rule_ints,
                inputs,
                rows=(start, stop),
                first_score_row=first + first_tile,
                repeat=repeat,
            )
    return index


def block_products(
    pooled_query: Tensor,
    pooled_key: Tensor,
    mask: AttentionMask,
    rows: tuple[int, int],
    first_tile: int,
    size: int,
) -> Tensor:
    """Products of some rows of mean queries with the mean keys they see: fp32 [B, h, rows, J].

    pooled_query [B, h, all rows, D], pooled_key [B, h, J, D], of one dtype; rows: the first and the
    one after the last; first_tile: of row 0 on the absolute grid; size: positions of a block. What
    a row does not see is left unwritten. Tensor cores multiply half precision with fp32 sums.
    """
    batch, count, mean_rows, _ = pooled_query.shape
    num_rows, num_blocks = rows[1] - rows[0], pooled_key.shape[2]
    scores = torch.empty(batch, count, num_rows, num_blocks, device=pooled_query.device)
    launch(
        product_spec(pooled_query, mask),
        "multiply_means",
        (-(-num_rows // BLOCK), count, batch),
        scores=scores,
        means=pooled_query,
        key_means=pooled_key,
        first_row=rows[0],
        num_rows=num_rows,
        mean_rows=mean_rows,
        num_blocks=num_blocks,
        first_tile=first_tile + rows[0],
        size=size,
        window=mask.window,
    )
    return scores


def product_spec(means: Tensor, mask: AttentionMask) -> TritonKernelSpec:
    """The kernel that multiplies means of queries with means of keys."""
    head_dim = means.shape[-1]
    return TritonKernelSpec(
        template="block_products",
        dtype=DTYPES[means.dtype],
        head_dim=head_dim,
        causal=mask.causal,
        window=mask.window > 0,
        num_warps=score_warps(head_dim),
        num_stages=2,
        target=target_for(means.device),
    )
