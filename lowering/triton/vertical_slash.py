"""Columns and diagonals from the last queries, by generated kernels.

Nothing waits for the device: budgets travel as kernel arguments, and torch.topk runs at a fixed
size. Letters: B batch, h heads asked for, H query heads, Hk kv heads, Nq queries, Nk keys,
D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import (
    AttentionMask,
    SparseIndex,
    diagonal_slots,
    empty_index,
    num_query_blocks,
)
from mpass.lowering.reference.vertical_slash import (
    LAST_QUERIES,
    LOCAL_DIAGONALS,
    SINK_COLUMNS,
    first_keys,
    last_rows,
    vertical_slash_width,
)
from mpass.lowering.triton.attention import mask_bytes
from mpass.lowering.triton.interpret import upcast
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, row_major, target_for
from mpass.lowering.triton.spec import SPLITS, KernelSpec, score_warps

LOG2_E = math.log2(math.e)


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
    """As mpass.lowering.reference.vertical_slash; the same entries at each run.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; sizes: one per head of `heads`.
    """
    batch, num_keys, count = query.shape[0], key.shape[2], len(heads)
    columns = [max(SINK_COLUMNS, size) for size in vertical_sizes]
    distances = [max(LOCAL_DIAGONALS, size) for size in slash_sizes]
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    width = vertical_slash_width(vertical_sizes, slash_sizes)
    index = empty_index(query, rows, width, diagonal_slots(count))
    if num_keys == 0 or count == 0:
        return index
    sums = last_query_sums(query, key, mask, heads, scale=scale)
    if mask.key_mask is None:
        sums[0, ..., :SINK_COLUMNS].fill_(torch.inf)
    else:
        positions = torch.arange(num_keys, device=key.device)
        after = positions - first_keys(mask, batch, key.device)[:, None, None]
        sums[0].masked_fill_((after >= 0) & (after < SINK_COLUMNS), torch.inf)
    sums[1, ..., :LOCAL_DIAGONALS].fill_(torch.inf)

    list_columns(index, sums[0], columns)
    list_diagonals(index, sums[1], distances, mask)
    return index


def list_columns(
    index: SparseIndex, sums: Tensor, sizes: Sequence[int], *, least: float = -1.0
) -> None:
    """Fill the columns of an index with the keys of largest sum, of those above `least`.

    sums: fp32 [B, h, Nk], none negative; sizes: most keys of each head.
    """
    batch, count, num_keys = sums.shape
    most = max(1, min(num_keys, max(sizes)))
    launch(
        select_spec(sums),
        "list_columns",
        (count, batch),
        index.column_count,
        index.column_index,
        sums,
        torch.topk(sums, most, dim=-1).values,
        device_ints(sizes, sums.device),
        count,
        num_keys,
        most,
        index.column_index.shape[-1],
        least,
    )


def list_diagonals(
    index: SparseIndex, sums: Tensor, sizes: Sequence[int], mask: AttentionMask
) -> None:
    """Fill the diagonals of an index with the blocks of the token distances of largest sum.

    sums: fp32 [B, h, Nk]; sizes: token distances to keep per head.
    """
    batch, count, num_keys = sums.shape
    most = min(num_keys, max(sizes))
    table = torch.empty(batch, count, num_keys, dtype=torch.uint8, device=sums.device)
    launch(
        select_spec(sums, window=mask.window > 0),
        "mark_distances",
        (count, batch),
        table,
        sums,
        torch.topk(sums, most, dim=-1).values,
        device_ints(sizes, sums.device),
        count,
        num_keys,
        most,
        mask.window,
    )
    launch(
        select_spec(sums, window=mask.window > 0),
        "list_diagonals",
        (count, batch),
        index.diagonal_count,
        index.diagonal_index,
        table,
        count,
        num_keys,
        index.diagonal_index.shape[-1],
    )


def select_spec(sums: Tensor, *, window: bool = False) -> KernelSpec:
    """The kernels that select keys and distances."""
    return KernelSpec("select", tile=1024, window=window, target=target_for(sums.device))


def last_query_sums(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    scale: float,
    looking: Sequence[int] | None = None,
) -> Tensor:
    """Attention of the last queries, summed per key and per distance: fp32 [2, B, h, Nk].

    As mpass.lowering.reference.vertical_slash.last_query_sums, stacked.
    """
    if query.device.type == "cpu":
        query, key = upcast(query), upcast(key)
    query, key = row_major(query), row_major(key)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys, count = key.shape[2], len(heads)
    looking = looking or [LAST_QUERIES] * count
    spec = KernelSpec(
        template="last_queries",
        dtype=DTYPES[query.dtype],
        head_dim=head_dim,
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        num_warps=score_warps(head_dim),
        num_stages=2,
        target=target_for(query.device),
    )
    last = last_rows(mask, batch, num_queries, query.device)[:, -1].contiguous()
    sums = torch.zeros(3, batch, count, num_keys, device=key.device)
    statistics = sums.new_empty(2, batch, count, SPLITS, LAST_QUERIES)
    tiles = -(-num_keys // LAST_QUERIES)
    tiles_per_split = max(1, -(-tiles // SPLITS))
    arguments = (
        query,
        key,
        mask_bytes(mask, last),
        last,
        *device_ints([*heads, *looking], query.device).split(count),
        *query.stride()[:3],
        *key.stride()[:3],
        num_keys,
        count,
        num_heads // key.shape[1],
        mask.query_offset,
        mask.window,
        tiles_per_split,
        scale * LOG2_E,
    )
    grid = (-(-tiles // tiles_per_split), count, batch)
    launch(spec, "row_statistics", grid, *statistics, *arguments)
    launch(spec, "sum_probabilities", grid, *sums, *statistics, *arguments)
    sums[1] += sums[2]
    return sums[:2]
