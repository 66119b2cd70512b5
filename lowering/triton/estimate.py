"""Index estimation by generated Triton kernels; the meaning stands in mpass.lowering.estimate.

Nothing waits for the device: budgets travel as kernel arguments, and torch.topk runs at a fixed
size. Letters: B batch, h heads asked for, H query heads, Hk kv heads, Nq queries, Nk keys,
D head_dim, I query blocks, J key blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from mpass.lowering.estimate import (
    LAST_QUERIES,
    LOCAL_DIAGONALS,
    SINK_COLUMNS,
    block_top_k_width,
    first_keys,
    last_rows,
    vertical_slash_width,
)
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    SparseIndex,
    diagonal_slots,
    empty_index,
    first_query_block,
    list_slots,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.triton.attention import mask_bytes
from mpass.lowering.triton.interpret import upcast
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, row_major, target_for
from mpass.lowering.triton.spec import SPLITS, KernelSpec, power_of_two
from torch import Tensor

LOG2_E = math.log2(math.e)

SCORE_BYTES = 1 << 29
"""Most memory of pooled block scores at a time; longer prompts take their query blocks in turns."""


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
    """As mpass.lowering.estimate.vertical_slash_index; the same entries at each run.

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

    most = min(num_keys, max(*columns, *distances))
    largest = torch.topk(sums, most, dim=-1).values
    limits = device_ints([*columns, *distances], query.device)
    spec = KernelSpec(
        template="select",
        tile=1024,
        window=mask.window > 0,
        target=target_for(query.device),
    )
    grid = (count, batch)
    table = torch.empty(batch, count, num_keys, dtype=torch.uint8, device=key.device)
    launch(
        spec,
        "list_columns",
        grid,
        index.column_count,
        index.column_index,
        sums[0],
        largest[0],
        limits,
        count,
        num_keys,
        most,
        index.column_index.shape[-1],
    )
    launch(
        spec,
        "mark_distances",
        grid,
        table,
        sums[1],
        largest[1],
        limits[count:],
        count,
        num_keys,
        most,
        mask.window,
    )
    launch(
        spec,
        "list_diagonals",
        grid,
        index.diagonal_count,
        index.diagonal_index,
        table,
        count,
        num_keys,
        index.diagonal_index.shape[-1],
    )
    return index


def last_query_sums(
    query: Tensor, key: Tensor, mask: AttentionMask, heads: Sequence[int], *, scale: float
) -> Tensor:
    """Attention of the last queries, summed per key and per distance: fp32 [2, B, h, Nk].

    As mpass.lowering.estimate.last_query_sums, stacked.
    """
    if query.device.type == "cpu":
        query, key = upcast(query), upcast(key)
    query, key = row_major(query), row_major(key)
    batch, num_heads, num_queries, head_dim = query.shape
    num_keys, count = key.shape[2], len(heads)
    spec = KernelSpec(
        template="last_queries",
        dtype=DTYPES[query.dtype],
        head_dim=head_dim,
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        num_warps=4 if head_dim <= 128 else 8,
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
        device_ints(heads, query.device),
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


def block_top_k_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    top_k: Sequence[int],
    block_sizes: Sequence[int],
) -> SparseIndex:
    """As mpass.lowering.estimate.block_top_k_index.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; top_k and block_sizes: one per head of `heads`. Heads
    of one block size are taken together.
    """
    if query.device.type == "cpu":
        query, key = upcast(query), upcast(key)
    query, key = row_major(query), row_major(key)
    rows = num_query_blocks(query.shape[2], mask.query_offset)
    width = block_top_k_width(top_k, block_sizes)
    index = empty_index(query, rows, width, list_slots(len(heads)))
    for block_size in sorted(set(block_sizes)):
        places = [i for i, size in enumerate(block_sizes) if size == block_size]
        _list_blocks(
            index,
            query,
            key,
            mask,
            [heads[i] for i in places],
            places,
            [max(1, top_k[i]) for i in places],
            block_size,
        )
    return index


def _list_blocks(
    index: SparseIndex,
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: list[int],
    places: list[int],
    top_k: list[int],
    block_size: int,
) -> None:
    """Fill the lists `places` of `index` for heads that share a block size."""
    batch, num_heads = query.shape[:2]
    kv_heads, num_keys = key.shape[1:3]
    group = num_heads // kv_heads
    ints = device_ints(
        [*heads, *(head // group for head in heads), *range(kv_heads), *places, *top_k],
        query.device,
    )
    count = len(heads)
    head_of, kv_of, every_kv, list_of, limits = ints.split([count, count, kv_heads, count, count])
    pooled_query = pooled_means(query, head_of, block_size, mask, offset=mask.query_offset)
    pooled_key = pooled_means(key, every_kv, block_size, mask, offset=0).index_select(1, kv_of)
    pooled_key = pooled_key.transpose(-1, -2)

    score_rows, score_blocks = pooled_query.shape[2], pooled_key.shape[3]
    repeat = block_size // BLOCK
    first_block = first_query_block(mask.query_offset)
    first_score_row = first_block // repeat
    num_rows = index.block_count.shape[2]
    width = power_of_two(score_blocks)
    spec = KernelSpec(
        template="blocks",
        tile=max(16, width),
        causal=mask.causal,
        window=mask.window > 0,
        num_warps=min(32, max(1, width // 256)),
        target=target_for(query.device),
    )
    step = max(1, SCORE_BYTES // max(1, 4 * batch * count * score_blocks))
    for start in range(0, score_rows, step):
        stop = min(score_rows, start + step)
        scores = pooled_query[:, :, start:stop] @ pooled_key
        first_row = max(0, (first_score_row + start) * repeat - first_block)
        last_row = min(num_rows, (first_score_row + stop) * repeat - first_block)
        launch(
            spec,
            "list_blocks",
            (last_row - first_row, count, batch),
            index.block_count,
            index.block_index,
            scores,
            limits,
            list_of,
            first_row,
            num_rows,
            index.block_count.shape[1],
            index.block_index.shape[-1],
            num_key_blocks(num_keys),
            stop - start,
            score_blocks,
            first_score_row + start,
            repeat,
            first_block,
            mask.window,
        )


def pooled_means(
    rows: Tensor, heads: Tensor, block_size: int, mask: AttentionMask, *, offset: int
) -> Tensor:
    """Mean of each block of positions: [B, H, N, D] -> fp32 [B, h, blocks, D].

    heads: int32 [h] on the device; offset: absolute position of the first row. Padding does not
    count where the mask tells of these rows.
    """
    batch, _, length, dim = rows.shape
    padding = mask.key_mask is not None and mask.key_mask.shape[1] >= offset + length
    blocks = -(-(offset + length) // block_size) - offset // block_size
    pooled = torch.empty(batch, len(heads), blocks, dim, device=rows.device)
    launch(
        KernelSpec(
            template="pool",
            dtype=DTYPES[rows.dtype],
            head_dim=dim,
            padding=padding,
            target=target_for(rows.device),
        ),
        "pool_blocks",
        (blocks, len(heads), batch),
        pooled,
        rows,
        heads,
        mask_bytes(mask, heads) if padding else heads,
        *rows.stride()[:3],
        length,
        mask.key_mask.shape[1] if mask.key_mask is not None else 0,
        block_size,
        offset,
    )
    return pooled
