"""How much of the attention an index computes, counted and in closed form.

Letters: B batch, H query heads, I query blocks, J key blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpass.lowering.dispatch import device_lowering
from mpass.lowering.index import (
    ALL_BLOCKS,
    ALL_DIAGONALS,
    BLOCK,
    AttentionMask,
    SparseIndex,
    first_query_block,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.reference import attention as reference

CHUNK_BLOCKS = 64
"""Query blocks counted at a time: the largest temporary is [B, H, CHUNK_BLOCKS, J]."""


def density(
    index: SparseIndex, mask: AttentionMask, *, batch: int, num_queries: int, num_keys: int
) -> Tensor:
    """Share of the cells allowed by `mask` that are computed: fp64 [B, H]. Exact.

    Plain causal masks are counted per block; others cell by cell, a chunk of queries at a time,
    but where every block is selected there is nothing to count. On a device whose host would wait
    for that answer everything is counted: nothing is read here, and the shares stay on the device.
    """
    inside = mask.query_offset + num_queries <= num_keys
    device = index.column_index.device
    readable = device_lowering(device).decides_by_cost
    if readable and inside and num_queries and mask.key_mask is None and selects_all(index):
        return torch.ones(batch, len(index.head_slots), dtype=torch.float64, device=device)
    plain = mask.causal and mask.window == 0 and mask.key_mask is None
    if not plain or not inside:
        return reference.density(
            index, mask, batch=batch, num_queries=num_queries, num_keys=num_keys
        )
    first = first_query_block(mask.query_offset)
    rows = num_query_blocks(num_queries, mask.query_offset)
    columns = reference.selected_columns(index, batch, num_keys)
    blocks = num_key_blocks(num_keys)
    padding = blocks * BLOCK - num_keys
    per_block = (
        torch.nn.functional.pad(columns, (0, padding)).unflatten(-1, (blocks, BLOCK)).sum(-1)
    )

    computed = torch.zeros(batch, len(index.head_slots), dtype=torch.int64, device=device)
    for start in range(0, rows, CHUNK_BLOCKS):
        local = torch.arange(start, min(rows, start + CHUNK_BLOCKS), device=device)
        absolute = local + first
        begin = (absolute * BLOCK).clamp(min=mask.query_offset)
        end = ((absolute + 1) * BLOCK).clamp(max=mask.query_offset + num_queries)
        selected = reference.selected_blocks(index, local, absolute, blocks, stop=first + rows)
        before = torch.arange(blocks, device=device)[None, :] < absolute[:, None]
        keys = torch.where(selected, BLOCK, per_block[:, :, None, :])
        full = torch.where(before, keys, 0).sum(-1) * (end - begin)
        # Rows begin..end-1 of the diagonal block see 1 + position - block start keys each.
        inner_first, inner_last = begin - absolute * BLOCK, end - absolute * BLOCK
        triangle = (inner_last * (inner_last + 1) - inner_first * (inner_first + 1)) // 2
        diagonal = selected.gather(-1, absolute.expand(*selected.shape[:2], -1)[..., None])[..., 0]
        computed += (full + torch.where(diagonal, triangle, 0)).sum(-1)
    last = mask.query_offset + num_queries
    total = (last * (last + 1) - mask.query_offset * (mask.query_offset + 1)) // 2
    return computed.double() / max(1, total)


def selects_all(index: SparseIndex) -> bool:
    """Whether every head selects every block, whatever the mask, as in layers that stay dense."""
    lists, diagonals = index.block_count, index.diagonal_count
    return bool((lists == ALL_BLOCKS).all()) and bool((diagonals == ALL_DIAGONALS).all())


def causal_work_share(index: SparseIndex, length: int) -> Tensor:
    """`work_share` of a whole causal prompt as a tensor, fp32 []: nothing waits for the device.

    length: of queries and keys.
    """
    rows = num_query_blocks(length, 0)
    heads = len(index.head_slots) * index.column_count.shape[0]
    device = index.column_count.device
    dense = rows * (rows + 1) / 2
    parts = []
    if index.block_count.numel():
        causal = torch.arange(1, rows + 1, device=device)
        counts = index.block_count
        parts.append(over_heads(index, torch.where(counts == ALL_BLOCKS, causal, counts)).float())
    if index.diagonal_count.numel():
        counts, entries = index.diagonal_count, index.diagonal_index
        parts.append((counts == ALL_DIAGONALS).sum(dtype=torch.float32) * dense)
        live = torch.arange(entries.shape[-1], device=device) < counts[..., None]
        per_diagonal = torch.where(live, (rows - entries).clamp(min=0), 0)
        parts.append(per_diagonal.sum(dtype=torch.float32))
    if index.column_index.numel():
        counts, entries = index.column_count, index.column_index
        live = torch.arange(entries.shape[-1], device=device) < counts[..., None]
        per_column = torch.where(live, (rows - 1 - entries // BLOCK).clamp(min=0), 0)
        parts.append(per_column.sum(dtype=torch.float32) / BLOCK)
    return torch.stack(parts).sum() / (dense * heads)


def work_share(
    index: SparseIndex,
    mask: AttentionMask,
    num_queries: int,
    num_keys: int,
    *,
    enough: float = math.inf,
) -> float:
    """Tiles that a kernel walks over tiles of dense causal attention, all heads together.

    An upper estimate in O(index size): columns inside of selected blocks count too, and where
    attention is not causal all blocks of a window and of a diagonal. enough: no more is counted
    once the share is above it.
    """
    first = first_query_block(mask.query_offset)
    rows = num_query_blocks(num_queries, mask.query_offset)
    blocks = num_key_blocks(num_keys)
    heads = len(index.head_slots) * index.column_count.shape[0]
    if not mask.causal:
        reach = blocks if mask.window == 0 else min(blocks, 2 * ((mask.window + 62) // BLOCK) + 1)
        dense = float(rows * reach)
        in_lists = index.block_count
        counts = in_lists.masked_fill(in_lists == ALL_BLOCKS, blocks).clamp(max=reach)
        diagonals = index.diagonal_count.masked_fill(index.diagonal_count == ALL_DIAGONALS, reach)
        tiles = float(over_heads(index, counts)) + float(diagonals.clamp(max=reach).sum()) * rows
        columns = float(index.column_count.sum()) / BLOCK * rows
        return (tiles + columns) / (dense * heads)
    last = first + rows  # query blocks first .. last - 1, block i has i + 1 causal tiles
    reach = last if mask.window == 0 else min(last, (mask.window + BLOCK - 2) // BLOCK + 1)
    dense = float(sum(min(i + 1, reach) for i in range(first, last)))

    in_lists = index.block_count
    causal = torch.arange(first + 1, last + 1, device=in_lists.device).clamp(max=reach)
    tiles = float(over_heads(index, torch.where(in_lists == ALL_BLOCKS, causal, in_lists)))
    tiles += float((index.diagonal_count < 0).sum()) * dense
    if tiles > enough * dense * heads:
        return tiles / (dense * heads)
    entries = index.diagonal_index
    live = torch.arange(entries.shape[-1], device=entries.device) < index.diagonal_count[..., None]
    live &= entries < reach
    per_diagonal = (last - entries.clamp(min=first)).clamp(min=0)
    tiles += float(torch.where(live, per_diagonal, 0).sum())

    entries = index.column_index
    live = torch.arange(entries.shape[-1], device=entries.device) < index.column_count[..., None]
    per_column = (last - (entries // BLOCK + 1).clamp(min=first)).clamp(min=0)
    if mask.window > 0:
        per_column = per_column.clamp(max=reach)
    tiles += float(torch.where(live, per_column, 0).sum()) / BLOCK
    return tiles / (dense * heads)


def over_heads(index: SparseIndex, counts: Tensor) -> Tensor:
    """Counts [B, L, I] of the lists, summed over the heads that read them: a tensor []."""
    slots = [slot for slot in index.head_slots if slot >= 0]
    if slots == list(range(counts.shape[1])):
        return counts.sum()
    rows = counts.sum((0, 2)).unbind()
    return torch.stack([rows[slot] for slot in slots]).sum()
