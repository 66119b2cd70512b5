"""Lists of key blocks from sums along antidiagonals, by generated kernels.

The meaning stands in mpass.lowering.reference.x_attention. Scores between groups live as one
logarithm per group of queries and key block (templates/group_scores.py.jinja), so that the product
is computed once and memory stays within SCORE_BYTES. Letters: B batch, H query heads, Hk kv heads,
Nq queries, Nk keys, D head_dim, G groups of queries of a launch, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    SparseIndex,
    empty_index,
    first_query_block,
    list_slots,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.reference.x_attention import AntidiagonalRule, antidiagonal_width
from mpass.lowering.triton.attention import LOG2_E, mask_bytes
from mpass.lowering.triton.block_scores import ListRule, alike, list_blocks, numbers_of, turns
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, target_for
from mpass.lowering.triton.pooled_keys import kernel_inputs
from mpass.lowering.triton.spec import GROUP_TILE, KernelSpec


def antidiagonal_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[AntidiagonalRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.x_attention.antidiagonal_index.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; rules: one per head of `heads`. Heads of one stride and
    block size are taken together.
    """
    query, key = kernel_inputs(query, key)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, rows, antidiagonal_width(rules), list_slots(len(heads)))
    first_block = first_query_block(mask.query_offset)
    num_blocks = num_key_blocks(key.shape[2])
    for (stride, size), places in alike([(rule.stride, rule.block_size) for rule in rules]):
        lists = [antidiagonal_list_rule(i, rules[i]) for i in places]
        ints = device_ints([*(heads[i] for i in places), *numbers_of(lists)], query.device)
        head_of, rule_ints = ints.split([len(places), 8 * len(places)])
        repeat = size // BLOCK
        for start, stop in turns(index, mask, len(places), BLOCK // stride * num_blocks, repeat):
            first_tile = (first_block + start) // repeat
            scores = group_scores(
                query,
                key,
                mask,
                head_of,
                (first_tile, (first_block + stop - 1) // repeat + 1),
                scale=scale,
                stride=stride,
                block_size=size,
            )
            list_blocks(
                index,
                scores,
                "row_mass",
                rule_ints,
                query,
                key,
                mask,
                rows=(start, stop),
                first_score_row=first_tile,
                repeat=repeat,
            )
    return index


def antidiagonal_list_rule(slot: int, rule: AntidiagonalRule) -> ListRule:
    """An AntidiagonalRule as the listing kernel takes it."""
    limit = rule.max_blocks * BLOCK // rule.block_size
    forced = (rule.sink_blocks, rule.local_blocks, rule.last_blocks)
    return ListRule(slot, limit, *forced, rule.threshold)


def group_scores(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Tensor,
    tiles: tuple[int, int],
    *,
    scale: float,
    stride: int,
    block_size: int,
) -> Tensor:
    """Attention between groups, summed over each tile of queries and of keys: fp32 [B, h, T, Jt].

    As mpass.lowering.reference.x_attention.antidiagonal_scores for some heads (int32 [h] on the
    device); tiles: the first tile of queries on the absolute grid and the one after the last. What
    a tile cannot see is left unwritten.
    """
    batch, num_keys = query.shape[0], key.shape[2]
    first_tile, stop_tile = tiles
    tile_lines = block_size // stride
    num_lines = (stop_tile - first_tile) * tile_lines
    num_blocks = num_key_blocks(num_keys)
    log_sums = torch.empty(batch, len(heads), num_lines, num_blocks, device=query.device)
    log_totals = log_sums.new_empty(batch, len(heads), num_lines)
    spec = group_spec(query, mask, stride)
    launch(
        spec,
        "score_groups",
        (-(-num_lines // spec.tile), len(heads), batch),
        log_sums,
        log_totals,
        query,
        key,
        mask_bytes(mask, heads),
        heads,
        *query.stride()[:3],
        *key.stride()[:3],
        first_tile * tile_lines,
        num_lines,
        query.shape[2],
        num_keys,
        num_blocks,
        query.shape[1] // key.shape[1],
        mask.query_offset,
        mask.window,
        scale * LOG2_E / stride,
    )
    score_blocks = -(-num_keys // block_size)
    scores = log_sums.new_empty(batch, len(heads), stop_tile - first_tile, score_blocks)
    launch(
        spec,
        "sum_groups",
        (stop_tile - first_tile, len(heads), batch),
        scores,
        log_sums,
        log_totals,
        first_tile,
        num_lines,
        num_blocks,
        score_blocks,
        tile_lines,
        block_size // BLOCK,
        mask.window,
    )
    return scores


def group_spec(query: Tensor, mask: AttentionMask, stride: int) -> KernelSpec:
    """The kernels of a stride: eight warps share a tile of 128 groups by 128."""
    return KernelSpec(
        template="group_scores",
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
