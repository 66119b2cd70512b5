"""Index estimation in plain torch: what the generated estimators of each device must select.

Every function returns a `SparseIndex` for the query heads it is asked for, in their order.
Letters: B batch, h heads asked for, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim,
I query blocks, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    first_query_block,
    list_slots,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.reference.attention import allowed_cells, masked_softmax

LAST_QUERIES = 64
"""Queries at the prompt's end from which vertical-slash estimates (MInference, section 3.2)."""

SINK_COLUMNS = 30
"""First keys that vertical-slash always keeps (MInference's released code)."""

LOCAL_DIAGONALS = 100
"""Nearest token distances that vertical-slash always keeps (MInference's released code)."""


def vertical_slash_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    scale: float,
    vertical_sizes: Sequence[int],
    slash_sizes: Sequence[int],
) -> SparseIndex:
    """Columns and diagonals with the most attention of the last queries (MInference, section 3.2).

    query [B, H, Nq, D], key [B, Hk, Nk, D]; vertical_sizes and slash_sizes: keys and token
    diagonals to keep, one number per head of `heads`. Every token diagonal s that is kept selects
    the two block diagonals that its cells lie in, s // BLOCK and ceil(s / BLOCK).
    """
    columns, diagonals = vertical_slash_selection(
        query,
        key,
        mask,
        heads,
        scale=scale,
        vertical_sizes=vertical_sizes,
        slash_sizes=slash_sizes,
    )
    width = vertical_slash_width(vertical_sizes, slash_sizes)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    return diagonal_index(query, rows, columns, block_diagonals(diagonals), width)


def vertical_slash_width(vertical_sizes: Sequence[int], slash_sizes: Sequence[int]) -> IndexWidth:
    """Buffer sizes of `vertical_slash_index`, from the budgets alone."""
    return IndexWidth(
        max_diagonals=2 * max(LOCAL_DIAGONALS, *slash_sizes) + 1,
        max_columns=max(SINK_COLUMNS, *vertical_sizes),
    )


def vertical_slash_selection(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    scale: float,
    vertical_sizes: Sequence[int],
    slash_sizes: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """The keys [B, h, Nk] and token distances [B, h, Nk] that are kept, as bool tables.

    The first SINK_COLUMNS keys and the LOCAL_DIAGONALS nearest distances are kept first and count
    towards the budgets, which are at least that large (minference.md's size clamp).
    """
    column_sums, diagonal_sums = last_query_sums(query, key, mask, heads, scale=scale)
    num_keys = key.shape[2]
    start = first_keys(mask, query.shape[0], key.device)
    positions = torch.arange(num_keys, device=key.device)
    sinks = (positions - start[:, None] >= 0) & (positions - start[:, None] < SINK_COLUMNS)
    column_sums = column_sums.masked_fill(sinks[:, None, :], torch.inf)
    diagonal_sums = diagonal_sums.masked_fill(positions < LOCAL_DIAGONALS, torch.inf)
    columns = largest(column_sums, [max(SINK_COLUMNS, size) for size in vertical_sizes])
    diagonals = largest(diagonal_sums, [max(LOCAL_DIAGONALS, size) for size in slash_sizes])
    if mask.window > 0:
        diagonals &= positions < mask.window
    return columns, diagonals


def last_query_sums(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    scale: float,
    looking: Sequence[int] | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, summed per key and per distance: two fp32 [B, h, Nk].

    The last LAST_QUERIES queries that are not padding, per batch row, or the last `looking[i]` of
    them for head `heads[i]`. Entry s of the second is the sum over pairs with
    `query position - key position == s`.
    """
    batch, _, num_queries, _ = query.shape
    num_keys = key.shape[2]
    rows = last_rows(mask, batch, num_queries, query.device)
    group = query.shape[1] // key.shape[1]
    picked = query[:, list(heads)].float()
    picked = picked.gather(
        2, rows[:, None, :, None].clamp(min=0).expand(*picked.shape[:2], -1, picked.shape[-1])
    )
    keys = key[:, [head // group for head in heads]].float()
    scores = picked @ keys.transpose(-1, -2) * scale

    positions = rows + mask.query_offset
    visible = torch.stack(
        [
            allowed_cells(AttentionMask(mask.causal, 0, mask.window), p, num_keys)[0]
            for p in positions
        ]
    )
    if mask.key_mask is not None:
        visible = visible & mask.key_mask[:, None, None, :]
    visible = visible & (rows >= 0)[:, None, :, None]
    if looking is not None:
        back = torch.arange(LAST_QUERIES, 0, -1, device=key.device)
        looks = back <= torch.tensor(list(looking), device=key.device)[:, None]
        visible = visible & looks[:, :, None]
    probabilities = masked_softmax(scores, visible)

    distance = positions[:, :, None] - torch.arange(num_keys, device=key.device)
    distance = distance[:, None].expand_as(probabilities)
    sums = torch.zeros(*probabilities.shape[:2], num_keys, device=key.device)
    sums.scatter_add_(
        2,
        distance.clamp(0, num_keys - 1).flatten(2),
        torch.where(distance >= 0, probabilities, 0.0).flatten(2),
    )
    return probabilities.sum(2), sums


def block_top_k_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    top_k: Sequence[int],
    block_sizes: Sequence[int],
) -> SparseIndex:
    """The blocks of largest mean-pooled score, per query block (MInference, section 3.2).

    Queries and keys are averaged over blocks of `block_sizes[h]` positions, a multiple of BLOCK;
    the top_k[h] key blocks of largest mean query x mean key are kept, the diagonal one always.
    """
    num_queries, num_keys = query.shape[2], key.shape[2]
    group = query.shape[1] // key.shape[1]
    rows = num_query_blocks(num_queries, mask.query_offset)
    columns = num_key_blocks(num_keys)
    per_head = []
    for i, head in enumerate(heads):
        pooled_query = pooled_means(query[:, head], block_sizes[i], mask, offset=mask.query_offset)
        pooled_key = pooled_means(key[:, head // group], block_sizes[i], mask, offset=0)
        table = top_k_blocks(pooled_query, pooled_key, mask, block_sizes[i], top_k[i])
        repeat = block_sizes[i] // BLOCK
        table = table.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
        skip = first_query_block(mask.query_offset) % repeat
        table = table[:, skip : skip + rows, :columns]
        if mask.causal:
            first = first_query_block(mask.query_offset)
            blocks = torch.arange(first, first + rows, device=query.device)
            distance = blocks[:, None] - torch.arange(columns, device=query.device)
            table = (table | (distance == 0)) & (distance >= 0)
        per_head.append(table)
    tables = torch.stack(per_head, dim=1)
    width = block_top_k_width(top_k, block_sizes)
    index = empty_index(query, rows, width, list_slots(len(heads)))
    counts, entries = table_to_list(tables, width.max_blocks)
    index.block_count.copy_(counts)
    index.block_index.copy_(entries)
    return index


def block_top_k_width(top_k: Sequence[int], block_sizes: Sequence[int]) -> IndexWidth:
    """Buffer sizes of `block_top_k_index`; one more block for a forced diagonal."""
    widest = max((k + 1) * size // BLOCK for k, size in zip(top_k, block_sizes, strict=True))
    return IndexWidth(max_blocks=widest)


def pooled_means(rows: Tensor, block_size: int, mask: AttentionMask, *, offset: int) -> Tensor:
    """Mean of each block of positions: [B, N, D] -> fp32 [B, blocks, D]; padding does not count.

    offset: absolute position of the first row; blocks lie on the absolute grid.
    """
    batch, length, dim = rows.shape
    first = offset // block_size
    lead = offset - first * block_size
    blocks = (lead + length + block_size - 1) // block_size
    tail = blocks * block_size - lead - length
    weight = torch.ones(batch, length, device=rows.device)
    if mask.key_mask is not None and mask.key_mask.shape[1] >= offset + length:
        weight = mask.key_mask[:, offset : offset + length].float()
    padded = torch.nn.functional.pad(rows.float() * weight[..., None], (0, 0, lead, tail))
    weight = torch.nn.functional.pad(weight, (lead, tail))
    sums = padded.view(batch, blocks, block_size, dim).sum(2)
    return sums / weight.view(batch, blocks, block_size).sum(2).clamp(min=1)[..., None]


def top_k_blocks(
    pooled_query: Tensor, pooled_key: Tensor, mask: AttentionMask, block_size: int, top_k: int
) -> Tensor:
    """Selected blocks, bool [B, I, J], of pooled queries [B, I, D] and pooled keys [B, J, D]."""
    scores = pooled_query @ pooled_key.transpose(1, 2)
    rows = torch.arange(scores.shape[1], device=scores.device) + mask.query_offset // block_size
    distance = rows[:, None] - torch.arange(scores.shape[2], device=scores.device)
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        allowed &= distance >= 0
    if mask.window > 0:
        allowed &= (distance - 1) * block_size < mask.window - 1
    scores = scores.masked_fill(~allowed, -torch.inf)
    if mask.causal:
        scores = scores.masked_fill(distance == 0, torch.inf)
    return largest(scores, [top_k] * scores.shape[1]) & allowed


def largest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Bool table of the `counts[r]` largest entries of each row: [B, R, N] -> [B, R, N].

    Ties go to the smaller index.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    limit = torch.tensor(list(counts), device=scores.device)[:, None]
    keep = torch.arange(scores.shape[-1], device=scores.device) < limit
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, keep.expand_as(order))


def block_diagonals(diagonals: Tensor) -> Tensor:
    """Token distances [B, h, Nk] -> block distances [B, h, J + 1] that hold their cells (bool)."""
    num_keys = diagonals.shape[-1]
    size = num_key_blocks(num_keys) + 1
    padded = torch.nn.functional.pad(diagonals, (0, size * BLOCK - num_keys))
    tiles = padded.view(*diagonals.shape[:-1], size, BLOCK)
    table = tiles.any(-1)
    table[..., 1:] |= tiles[..., :-1, 1:].any(-1)
    table[..., 0] = True
    return table


def diagonal_index(
    query: Tensor, num_rows: int, columns: Tensor, diagonals: Tensor, width: IndexWidth
) -> SparseIndex:
    """An index in diagonal form from bool tables of keys [B, h, Nk] and block distances."""
    index = empty_index(query, num_rows, width, diagonal_slots(columns.shape[1]))
    for table, count, entries in (
        (diagonals, index.diagonal_count, index.diagonal_index),
        (columns, index.column_count, index.column_index),
    ):
        counts, indices = table_to_list(table, entries.shape[-1])
        count.copy_(counts)
        entries.copy_(indices)
    return index


def table_to_list(table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts [...] and ascending positions [..., width] of the true entries of a bool [..., N]."""
    counts = table.sum(-1)
    order = torch.sort(table.to(torch.uint8), dim=-1, descending=True, stable=True).indices
    order = torch.nn.functional.pad(order, (0, max(0, width - order.shape[-1])))[..., :width]
    live = torch.arange(width, device=table.device) < counts[..., None]
    return counts, torch.where(live, order, 0)


def last_rows(mask: AttentionMask, batch: int, num_queries: int, device: torch.device) -> Tensor:
    """Rows of the last queries that are not padding, ascending: int64 [B, LAST_QUERIES].

    Negative where a batch row has fewer.
    """
    last = torch.full((batch,), num_queries - 1, device=device)
    offset = mask.query_offset
    if mask.key_mask is not None and mask.key_mask.shape[1] >= offset + num_queries:
        valid = mask.key_mask[:, offset : offset + num_queries]
        rows = torch.arange(num_queries, device=device)
        last = torch.where(valid, rows, -1).amax(-1)
    return last[:, None] - torch.arange(LAST_QUERIES - 1, -1, -1, device=device)


def first_keys(mask: AttentionMask, batch: int, device: torch.device) -> Tensor:
    """Position of the first key that is not padding, per batch row: int64 [B]."""
    if mask.key_mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return mask.key_mask.to(torch.uint8).argmax(-1)
