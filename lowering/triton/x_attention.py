"""Lists of key blocks from sums along antidiagonals, by generated kernels.

The meaning stands in mpass.lowering.reference.x_attention. Scores between groups live as one
logarithm per group of queries and key block (templates/x_attention.py.jinja), so that the product
is computed once and memory stays within SCORE_BYTES. Letters: B batch, H query heads, Hk kv heads,
Nq queries, Nk keys, D head_dim, G groups of queries of a launch, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex, num_key_blocks
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.x_attention import XAttentionRule, x_attention_width
from mpass.lowering.triton.attention import LOG2_E, mask_bytes
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, strides, target_for
from mpass.lowering.triton.list_blocks import (
    ListRule,
    empty_lists,
    group_by_kind,
    list_blocks,
    numbers_of,
    score_chunks,
)
from mpass.lowering.triton.pooled_keys import kernel_inputs
from mpass.lowering.triton.spec import GROUP_TILE, TritonKernelSpec

GROUP_BYTES = 1 << 31
"""Most memory of sums of groups at a time.

A program takes the groups of a thousand queries, so that a million keys and 32 heads leave 256
programs a turn: fewer would not fill a GPU.
"""


def x_attention_index(inputs: EstimateInputs, rules: Sequence[XAttentionRule]) -> SparseIndex:
    """As mpass.lowering.reference.x_attention.

    Heads of one stride and block size are taken together.
    """
    inputs = kernel_inputs(inputs)
    index = empty_lists(inputs, x_attention_width(rules))
    num_blocks = num_key_blocks(inputs.num_keys)
    for (stride, size), places in group_by_kind([(r.stride, r.block_size) for r in rules]):
        count = len(places)
        lists = [x_attention_list_rule(i, rules[i]) for i in places]
        ints = device_ints(
            [*(inputs.heads[i] for i in places), *numbers_of(lists)], inputs.query.device
        )
        head_of, rule_ints = ints.split([count, 8 * count])
        repeat = size // BLOCK
        turns = score_chunks(
            index,
            inputs.mask,
            count,
            BLOCK // stride * num_blocks,
            repeat,
            score_bytes=4,
            most_bytes=GROUP_BYTES,
        )
        for start, stop in turns:
            first_tile = (inputs.first_block + start) // repeat
            stop_tile = (inputs.first_block + stop - 1) // repeat + 1
            tiles = (first_tile, stop_tile)
            list_blocks(
                index,
                x_attention_scores(inputs, head_of, tiles, stride=stride, block_size=size),
                "row_mass",
                rule_ints,
                inputs,
                rows=(start, stop),
                first_score_row=first_tile,
                repeat=repeat,
            )
    return index


def x_attention_list_rule(slot: int, rule: XAttentionRule) -> ListRule:
    """An XAttentionRule as the listing kernel takes it."""
    limit = rule.max_blocks * BLOCK // rule.block_size
    forced = (rule.sink_blocks, rule.local_blocks, rule.last_blocks)
    return ListRule(slot, limit, *forced, rule.threshold)


def x_attention_scores(
    inputs: EstimateInputs,
    heads: Tensor,
    tiles: tuple[int, int],
    *,
    stride: int,
    block_size: int,
) -> Tensor:
    """Attention between groups, summed over each tile of queries and of keys: fp32 [B, h, T, Jt].

    As the function of that name in mpass.lowering.reference.x_attention, for some heads (int32 [h]
    on the device). tiles: the first tile of queries on the absolute grid and the one after the
    last. What a tile cannot see is left unwritten.
    """
    query, key, mask = inputs.query, inputs.key, inputs.mask
    batch, count, num_keys = inputs.batch, len(heads), inputs.num_keys
    first_tile, stop_tile = tiles
    tile_lines = block_size // stride
    num_lines = (stop_tile - first_tile) * tile_lines
    num_blocks = num_key_blocks(num_keys)
    log_sums = torch.empty(batch, count, num_lines, num_blocks, device=query.device)
    log_totals = log_sums.new_empty(batch, count, num_lines)
    spec = group_spec(query, mask, stride)
    launch(
        spec,
        "score_groups",
        (-(-num_lines // spec.tile), count, batch),
        log_sums=log_sums,
        log_totals=log_totals,
        query=query,
        key=key,
        key_mask=mask_bytes(mask, heads),
        heads=heads,
        **strides("query", query),
        **strides("key", key),
        first_group=first_tile * tile_lines,
        num_lines=num_lines,
        num_queries=inputs.num_queries,
        num_keys=num_keys,
        num_blocks=num_blocks,
        heads_per_kv=inputs.group,
        query_offset=mask.query_offset,
        window=mask.window,
        scale=inputs.scale * LOG2_E / stride,
    )
    score_blocks = -(-num_keys // block_size)
    scores = log_sums.new_empty(batch, count, stop_tile - first_tile, score_blocks)
    launch(
        spec,
        "sum_groups",
        (stop_tile - first_tile, count, batch),
        scores=scores,
        log_sums=log_sums,
        log_totals=log_totals,
        first_tile=first_tile,
        num_lines=num_lines,
        num_blocks=num_blocks,
        score_blocks=score_blocks,
        tile_lines=tile_lines,
        repeat=block_size // BLOCK,
        window=mask.window,
    )
    return scores


def group_spec(query: Tensor, mask: AttentionMask, stride: int) -> TritonKernelSpec:
    """The kernels of a stride: eight warps share a tile of 128 groups by 128."""
    return TritonKernelSpec(
        template="x_attention",
        dtype=DTYPES[query.dtype],
        head_dim=query.shape[-1],
        tile=GROUP_TILE,
        pool=stride,
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        num_warps=8,
        num_stages=3,
        target=target_for(query.device),
    )
