"""From scores of key blocks to an index in list form: what adaptive block patterns share.

Scores come a chunk of query blocks at a time and leave as lists, so that memory is O(N): no table
of query blocks x key blocks is ever whole. Letters: B batch, h heads asked for, I query blocks, C
query blocks of a chunk, J key blocks, Nk keys.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.index import (
    ALL_BLOCKS,
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    empty_index,
    first_query_block,
    list_slots,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.reference.selection import first_keys, running_sums, table_to_list

CHUNK_BLOCKS = 16
"""Query blocks whose scores exist at the same time."""

BlockRule = Callable[[int, Tensor], Tensor]
"""(position among the heads, query blocks [C] on the absolute grid) -> kept, bool [B, C, J]."""


@dataclass(frozen=True, slots=True, eq=False)
class Candidates:
    """Blocks among which a rule chooses, and what it may not change.

    scores: fp32 [B, C, J], 0 or more; forced: bool [B, C, J], kept whatever they score; allowed:
    bool [C, J]; whole: bool [B, C], query blocks that keep every allowed block; max_blocks: at most
    this many are kept by the others: the forced ones first, then those of largest score, ties to
    the smaller index.
    """

    scores: Tensor
    forced: Tensor
    allowed: Tensor
    whole: Tensor
    max_blocks: int


def list_index(
    query: Tensor,
    mask: AttentionMask,
    num_heads: int,
    width: IndexWidth,
    rule: BlockRule,
    columns: Tensor | None = None,
) -> SparseIndex:
    """The index of a rule that keeps key blocks, and of vertical columns if given.

    query [B, H, Nq, D], columns bool [B, h, Nk]. The rule must not keep more than
    `width.max_blocks` per query block, or else every block: that is written as ALL_BLOCKS.
    """
    first = first_query_block(mask.query_offset)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, rows, width, list_slots(num_heads))
    for head in range(num_heads):
        for start in range(0, rows, CHUNK_BLOCKS):
            stop = min(rows, start + CHUNK_BLOCKS)
            blocks = torch.arange(first + start, first + stop, device=query.device)
            counts, entries = table_to_list(rule(head, blocks), width.max_blocks)
            full = counts > width.max_blocks
            index.block_count[:, head, start:stop] = counts.masked_fill(full, ALL_BLOCKS)
            index.block_index[:, head, start:stop] = entries.masked_fill(full[..., None], 0)
    if columns is not None:
        counts, entries = table_to_list(columns, width.max_columns)
        index.column_count.copy_(counts)
        index.column_index.copy_(entries)
    return index


def tiled(rule: BlockRule, block_size: int, mask: AttentionMask, num_keys: int) -> BlockRule:
    """A rule over blocks of `block_size` positions, a multiple of BLOCK, as one over BLOCK."""
    repeat = block_size // BLOCK
    if repeat == 1:
        return rule

    def finer(head: int, blocks: Tensor) -> Tensor:
        # As many tiles as so many blocks can touch; how many they do touch only the device knows.
        own = blocks // repeat
        most = (len(blocks) + repeat - 2) // repeat + 1
        tiles = torch.minimum(own[:1] + torch.arange(most, device=blocks.device), own[-1:])
        table = rule(head, tiles)[:, own - own[:1]].repeat_interleave(repeat, -1)
        return table[..., : num_key_blocks(num_keys)] & allowed_blocks(mask, blocks, num_keys)

    return finer


def candidates(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    blocks: Tensor,
    scores: Tensor,
    *,
    sink_blocks: int,
    local_blocks: int,
    last_blocks: int,
    max_blocks: int,
    block_size: int = BLOCK,
) -> Candidates:
    """What a rule chooses from, with sinks, window and dense last rows kept by force.

    scores: [B, C, J] for the query blocks `blocks` [C]. sink_blocks: from the block of the first
    real key on; local_blocks: up to the query block's own, itself included; last_blocks: query
    blocks at the end that keep everything; max_blocks counts blocks of BLOCK, all others of
    `block_size`.
    """
    batch, num_keys = query.shape[0], key.shape[2]
    allowed = allowed_blocks(mask, blocks, num_keys, block_size)
    keys = torch.arange(allowed.shape[1], device=blocks.device)
    start = first_keys(mask, batch, blocks.device)[:, None, None] // block_size
    distance = (blocks[:, None] - keys).abs()
    # Causal attention always keeps the diagonal block, so that every query sees itself.
    local = distance < (max(1, local_blocks) if mask.causal else local_blocks)
    sinks = (keys >= start) & (keys < start + sink_blocks)
    last = last_query(mask, batch, query.shape[2], blocks.device)[:, None] // block_size
    return Candidates(
        scores=scores,
        forced=(sinks | local) & allowed,
        allowed=allowed,
        whole=(blocks > last - last_blocks) & (blocks <= last),
        max_blocks=max_blocks * BLOCK // block_size,
    )


def allowed_blocks(
    mask: AttentionMask, blocks: Tensor, num_keys: int, block_size: int = BLOCK
) -> Tensor:
    """Key blocks of which the query blocks `blocks` [C] see a key, padding aside: bool [C, J]."""
    count = (num_keys + block_size - 1) // block_size
    distance = blocks[:, None] - torch.arange(count, device=blocks.device)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        allowed &= distance >= 0
    if mask.window > 0:
        allowed &= (distance - 1) * block_size < mask.window - 1
    return allowed


def last_query(mask: AttentionMask, batch: int, num_queries: int, device: torch.device) -> Tensor:
    """Position of the last real query, per batch row: int64 [B]; -1 if all are padding."""
    real = query_mask(mask, num_queries)
    if real is None:
        return torch.full((batch,), mask.query_offset + num_queries - 1, device=device)
    positions = torch.arange(num_queries, device=device) + mask.query_offset
    return torch.where(real, positions, -1).amax(-1)


def query_mask(mask: AttentionMask, num_queries: int) -> Tensor | None:
    """Which queries are real, bool [B, Nq]; None where all are or where nothing tells."""
    stop = mask.query_offset + num_queries
    if mask.key_mask is None or mask.key_mask.shape[1] < stop:
        return None
    return mask.key_mask[:, mask.query_offset : stop]


def keep_mass(candidates: Candidates, mass: float, first: Tensor | None = None) -> Tensor:
    """The smallest set that holds the forced blocks and `mass` of the scores: bool [B, C, J].

    first: blocks (bool [B, C, J]) that are kept too, right after the forced ones. A mass of 1 keeps
    every allowed block, also those that score 0.
    """
    order, value = rank_blocks(candidates, first)
    before = running_sums(value) - value
    wanted = before < mass * value.sum(-1, keepdim=True)
    if first is not None:
        wanted |= first.gather(-1, order)
    return keep(candidates, order, wanted if mass < 1 else torch.ones_like(wanted))


def keep_above(candidates: Candidates, share: float) -> Tensor:
    """The forced blocks and those that score at least `share` of the best one: bool [B, C, J]."""
    order, value = rank_blocks(candidates)
    wanted = (value >= share * value.amax(-1, keepdim=True)) & (value > 0)
    return keep(candidates, order, wanted)


def rank_blocks(candidates: Candidates, first: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Indices and scores of the blocks, [B, C, J]: forced ones first, then by descending score.

    first: blocks (bool [B, C, J]) that come before all others that are not forced.
    """
    scores = torch.where(candidates.allowed, candidates.scores, 0.0)
    rank = scores if first is None else torch.where(first, scores, scores - scores.amax() - 1)
    rank = rank.masked_fill(~candidates.allowed, -torch.inf)
    rank = rank.masked_fill(candidates.forced, torch.inf)
    order = torch.sort(rank, dim=-1, descending=True, stable=True).indices
    return order, scores.gather(-1, order)


def keep(candidates: Candidates, order: Tensor, wanted: Tensor) -> Tensor:
    """The wanted blocks (bool, in `order`), the forced and whole ones, within the limit."""
    wanted = wanted | candidates.forced.gather(-1, order) | candidates.whole[..., None]
    wanted &= candidates.allowed.expand_as(order).gather(-1, order)
    wanted[..., candidates.max_blocks :] &= candidates.whole[..., None]
    return torch.zeros_like(candidates.forced).scatter_(-1, order, wanted)
