"""Lists of key blocks from pooled keys, by generated kernels.

The meaning stands in mpass.lowering.reference.vertical_slash, block_scores and union. All of them
score key blocks and then list what is kept (templates/blocks.py.jinja); long prompts take their
query blocks in turns, so that the scores need no more than SCORE_BYTES. Letters: B batch, h heads
asked for, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, I query blocks, J key
blocks, S runs of keys that share a mean.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

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
from mpass.lowering.reference.block_lists import last_query
from mpass.lowering.reference.block_scores import TileRule, tile_width
from mpass.lowering.reference.union import UnionRule, union_width
from mpass.lowering.reference.vertical_slash import block_top_k_width, first_keys
from mpass.lowering.triton.attention import LOG2_E
from mpass.lowering.triton.launch import device_ints, launch, target_for
from mpass.lowering.triton.pooled_keys import (
    kernel_inputs,
    pooled_keys,
    pooled_means,
    score_arguments,
)
from mpass.lowering.triton.spec import KernelSpec, Rule, power_of_two, select_warps
from mpass.lowering.triton.vertical_slash import last_query_sums, list_columns

Kind = TypeVar("Kind", bound=int | tuple[float, ...])

SCORE_BYTES = 1 << 29
"""Most memory of block scores at a time; longer prompts take their query blocks in turns."""


@dataclass(frozen=True, slots=True)
class ListRule:
    """What one head keeps, as templates/blocks.py.jinja takes it.

    slot: row of the lists; limit and the numbers of forced blocks count blocks of the scores' size;
    share: of the best score or of all scores.
    """

    slot: int
    limit: int
    sink_blocks: int = 0
    local_blocks: int = 0
    last_blocks: int = 0
    share: float = 0.0

    def numbers(self) -> tuple[int, ...]:
        """As int32 of the `rules` argument."""
        forced = (self.sink_blocks, self.local_blocks, self.last_blocks)
        return (self.slot, self.limit, *forced, float_bits(self.share), 0, 0)


def float_bits(value: float) -> int:
    """The int32 with the bits of a float32."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def block_top_k_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    top_k: Sequence[int],
    block_sizes: Sequence[int],
) -> SparseIndex:
    """As mpass.lowering.reference.vertical_slash.block_top_k_index.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; top_k and block_sizes: one per head of `heads`. Heads
    of one block size are taken together.
    """
    query, key = kernel_inputs(query, key)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    width = block_top_k_width(top_k, block_sizes)
    index = empty_index(query, rows, width, list_slots(len(heads)))
    group = query.shape[1] // key.shape[1]
    for size, places in alike(block_sizes):
        count = len(places)
        picked = [heads[i] for i in places]
        rules = [ListRule(i, max(1, top_k[i])) for i in places]
        ints = device_ints(
            [*picked, *(head // group for head in picked), *numbers_of(rules)], query.device
        )
        head_of, kv_of, rule_ints = ints.split([count, count, 8 * count])
        pooled_query, _ = pooled_means(
            query, head_of, size, mask, offset=mask.query_offset, dtype=torch.float32
        )
        pooled_key, _ = pooled_means(key, kv_of, size, mask, dtype=torch.float32)
        pooled_key = pooled_key.transpose(-1, -2)
        repeat = size // BLOCK
        first_tile = first_query_block(mask.query_offset) // repeat
        for start, stop in turns(index, mask, count, pooled_key.shape[-1], repeat):
            first = (first_query_block(mask.query_offset) + start) // repeat - first_tile
            last = (first_query_block(mask.query_offset) + stop - 1) // repeat - first_tile
            list_blocks(
                index,
                pooled_query[:, :, first : last + 1] @ pooled_key,
                "top_k",
                rule_ints,
                query,
                key,
                mask,
                rows=(start, stop),
                first_score_row=first + first_tile,
                repeat=repeat,
            )
    return index


def tile_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[TileRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.block_scores.tile_index; means are rounded to the keys' dtype.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; rules: one per head of `heads`. Heads of one block size
    and kind of cut are taken together.
    """
    query, key = kernel_inputs(query, key)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, rows, tile_width(rules), list_slots(len(heads)))
    first_block = first_query_block(mask.query_offset)
    kinds = [(rule.block_size, rule.share is None) for rule in rules]
    for (size, by_mass), places in alike(kinds):
        lists = [tile_list_rule(i, rules[i]) for i in places]
        ints = device_ints([*(heads[i] for i in places), *numbers_of(lists)], query.device)
        head_of, rule_ints = ints.split([len(places), 8 * len(places)])
        means, weights = pooled_keys(key, mask, size)
        spec, common = score_arguments("tile_scores", query, means, weights, mask, head_of)
        for start, stop in turns(index, mask, len(places), means.shape[2], size // BLOCK):
            scores = torch.empty(
                query.shape[0], len(places), stop - start, means.shape[2], device=query.device
            )
            launch(
                spec,
                "score_tiles",
                (stop - start, len(places), query.shape[0]),
                scores,
                *common,
                *query.stride()[:3],
                first_block + start,
                query.shape[2],
                key.shape[2],
                key.shape[1],
                query.shape[1] // key.shape[1],
                means.shape[2],
                size,
                mask.query_offset,
                mask.window,
                scale * LOG2_E,
            )
            list_blocks(
                index,
                scores,
                "mass" if by_mass else "share",
                rule_ints,
                query,
                key,
                mask,
                rows=(start, stop),
                first_score_row=first_block + start,
                repeat=size // BLOCK,
            )
    return index


def tile_list_rule(slot: int, rule: TileRule) -> ListRule:
    """A TileRule as the listing kernel takes it."""
    share = rule.mass if rule.share is None else rule.share
    assert share is not None  # one of both is given
    return ListRule(
        slot,
        rule.max_blocks * BLOCK // rule.block_size,
        rule.sink_blocks,
        rule.local_blocks,
        rule.last_blocks,
        share,
    )


def union_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[UnionRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.union.union_index; means are rounded to the keys' dtype.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; rules: one per head of `heads`. Heads that sample the
    same rows and pool alike are taken together.
    """
    query, key = kernel_inputs(query, key)
    num_rows = num_query_blocks(query.shape[2], mask.query_offset)
    width = union_width(rules)
    index = empty_index(query, num_rows, width, list_slots(len(heads)))
    first_block = first_query_block(mask.query_offset)
    num_blocks = num_key_blocks(key.shape[2])
    for (sampled, pool), places in alike([(rule.rows, rule.pool) for rule in rules]):
        lists = [union_list_rule(i, rules[i]) for i in places]
        shares = [float_bits(rules[i].row_share) for i in places]
        count = len(places)
        ints = device_ints([*(heads[i] for i in places), *shares, *numbers_of(lists)], query.device)
        head_of, row_shares, rule_ints = ints.split([count, count, 8 * count])
        means, weights = pooled_keys(key, mask, pool)
        spec, common = score_arguments(
            "row_scores", query, means, weights, mask, head_of, rows=sampled, pool=pool
        )
        for start, stop in turns(index, mask, count, num_blocks, 1):
            scores = torch.empty(
                query.shape[0], count, stop - start, num_blocks, device=query.device
            )
            launch(
                spec,
                "score_rows",
                (-(-(stop - start) * sampled // BLOCK), count, query.shape[0]),
                scores,
                *common,
                row_shares,
                *query.stride()[:3],
                first_block + start,
                first_block + stop,
                query.shape[2],
                key.shape[2],
                key.shape[1],
                query.shape[1] // key.shape[1],
                means.shape[2],
                mask.query_offset,
                mask.window,
                scale * LOG2_E,
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
                first_score_row=first_block + start,
                repeat=1,
            )
    if width.max_columns and 0 not in (len(heads), key.shape[2]):
        looking = [rule.last_queries for rule in rules]
        sums = last_query_sums(query, key, mask, heads, scale=scale, looking=looking)
        list_columns(index, sums[0], [rule.columns for rule in rules], least=0.0)
    return index


def union_list_rule(slot: int, rule: UnionRule) -> ListRule:
    """The blocks of a UnionRule as the listing kernel takes them."""
    forced = (rule.sink_blocks, rule.local_blocks, rule.last_blocks)
    return ListRule(slot, rule.max_blocks, *forced, rule.mass)


def alike(kinds: Sequence[Kind]) -> Iterator[tuple[Kind, list[int]]]:
    """Every kind once with the positions where it stands: what may run in one launch."""
    for kind in sorted(set(kinds)):
        yield kind, [i for i, other in enumerate(kinds) if other == kind]


def numbers_of(rules: Sequence[ListRule]) -> list[int]:
    """All rules in a row, as `device_ints` takes them."""
    return [number for rule in rules for number in rule.numbers()]


def turns(
    index: SparseIndex, mask: AttentionMask, count: int, score_blocks: int, repeat: int
) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks whose scores exist at the same time, in whole tiles of `repeat`.

    count: heads; score_blocks: scores of a query block and head. Empty where there are no scores.
    """
    batch, _, rows = index.block_count.shape
    if 0 in (batch, count, score_blocks):
        return
    step = max(1, SCORE_BYTES // (4 * batch * count * score_blocks) // repeat) * repeat
    first = first_query_block(mask.query_offset)
    start = 0
    while start < rows:
        stop = min(rows, (first + start) // repeat * repeat + step - first)
        yield start, stop
        start = stop


def list_blocks(
    index: SparseIndex,
    scores: Tensor,
    rule: Rule,
    rules: Tensor,
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    *,
    rows: tuple[int, int],
    first_score_row: int,
    repeat: int,
) -> None:
    """Fill the lists of some query blocks of `index` from their scores.

    scores: fp32 [B, h, rows, J], of key blocks of `repeat` times BLOCK keys; rules: int32 [h * 8],
    ListRule.numbers of each; rows: first query block of the lists and the one after the last;
    first_score_row: of `scores`, see templates/blocks.py.jinja.
    """
    batch, count, score_rows, score_blocks = scores.shape
    start, stop = rows
    width = max(16, power_of_two(score_blocks))
    padding = mask.key_mask is not None and rule != "top_k"
    launch(
        KernelSpec(
            template="blocks",
            tile=width,
            rule=rule,
            causal=mask.causal,
            window=mask.window > 0,
            padding=padding,
            num_warps=select_warps(width),
            target=target_for(query.device),
        ),
        "list_blocks",
        (stop - start, count, batch),
        index.block_count,
        index.block_index,
        scores,
        rules,
        real_bounds(query, key, mask) if padding else rules,
        start,
        index.block_count.shape[2],
        index.block_count.shape[1],
        index.block_index.shape[-1],
        num_key_blocks(key.shape[2]),
        score_rows,
        score_blocks,
        first_score_row,
        repeat,
        first_query_block(mask.query_offset),
        mask.query_offset + query.shape[2] - 1,
        mask.window,
    )


def real_bounds(query: Tensor, key: Tensor, mask: AttentionMask) -> Tensor:
    """Positions of the first real key and of the last real query (-1: none), int32 [B, 2]."""
    batch, device = query.shape[0], query.device
    bounds = first_keys(mask, batch, device), last_query(mask, batch, query.shape[2], device)
    return torch.stack(bounds, -1).to(torch.int32)
