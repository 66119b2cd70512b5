"""Columns and diagonals from the last queries, by generated kernels.

Nothing waits for the device: budgets travel as kernel arguments, and torch.topk runs at a fixed
size. Letters: B batch, h heads asked for, H query heads, Hk kv heads, Nq queries, Nk keys,
D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask, SparseIndex, diagonal_slots, empty_index
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.selection import LAST_QUERIES, first_keys, last_row
from mpass.lowering.reference.vertical_slash import (
    LOCAL_DIAGONALS,
    SINK_COLUMNS,
    VerticalSlashRule,
    vertical_slash_width,
)
from mpass.lowering.triton.attention import bias_arguments, mask_bytes
from mpass.lowering.triton.interpret import interpreted, upcast
from mpass.lowering.triton.launch import (
    DTYPES,
    device_ints,
    launch,
    row_major,
    strides,
    target_for,
)
from mpass.lowering.triton.spec import SPLITS, TritonKernelSpec, score_warps

LOG2_E = math.log2(math.e)


def vertical_slash_index(inputs: EstimateInputs, rules: Sequence[VerticalSlashRule]) -> SparseIndex:
    """As mpass.lowering.reference.vertical_slash; the same entries at each run."""
    mask, num_keys, device = inputs.mask, inputs.num_keys, inputs.key.device
    columns = [max(SINK_COLUMNS, rule.vertical_size) for rule in rules]
    distances = [max(LOCAL_DIAGONALS, rule.slash_size) for rule in rules]
    width, slots = vertical_slash_width(rules), diagonal_slots(len(inputs.heads))
    index = empty_index(inputs.query, inputs.num_blocks, width, slots)
    if num_keys == 0 or len(inputs.heads) == 0:
        return index
    sums = last_query_sums(inputs)
    if mask.key_mask is None:
        sums[0, ..., :SINK_COLUMNS].fill_(torch.inf)
    else:
        positions = torch.arange(num_keys, device=device)
        after = positions - first_keys(mask, inputs.batch, device)[:, None, None]
        sums[0].masked_fill_((after >= 0) & (after < SINK_COLUMNS), torch.inf)
    sums[1, ..., :LOCAL_DIAGONALS].fill_(torch.inf)

    list_columns(index, sums[0], columns)
    list_diagonals(index, sums[1], distances, mask)
    return index


def bias_lines(bias: Tensor | None, num_queries: int) -> dict[str, Any]:
    """A bias by distance [H or 1, L] as kernels of estimation read it, in log2 units."""
    if bias is None:
        return {}
    given = bias_arguments(bias.to(torch.float32) * LOG2_E, 1.0)
    return {"bias": given["bias"], "bias_head": given["bias_head"], "num_queries": num_queries}


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
        column_count=index.column_count,
        column_index=index.column_index,
        scores=sums,
        largest=torch.topk(sums, most, dim=-1).values,
        limits=device_ints(sizes, sums.device),
        num_heads=count,
        num_keys=num_keys,
        width=most,
        max_columns=index.column_index.shape[-1],
        least=least,
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
        table=table,
        scores=sums,
        largest=torch.topk(sums, most, dim=-1).values,
        limits=device_ints(sizes, sums.device),
        num_heads=count,
        num_keys=num_keys,
        width=most,
        window=mask.window,
    )
    launch(
        select_spec(sums, window=mask.window > 0),
        "list_diagonals",
        (count, batch),
        diagonal_count=index.diagonal_count,
        diagonal_index=index.diagonal_index,
        table=table,
        num_heads=count,
        num_keys=num_keys,
        max_diagonals=index.diagonal_index.shape[-1],
    )


def select_spec(sums: Tensor, *, window: bool = False) -> TritonKernelSpec:
    """The kernels that select keys and distances."""
    return TritonKernelSpec("select", tile=1024, window=window, target=target_for(sums.device))


def last_query_sums(
    inputs: EstimateInputs, num_last_queries: Sequence[int] | None = None
) -> Tensor:
    """Attention of the last queries, summed per key and per distance: fp32 [2, B, h, Nk].

    As mpass.lowering.reference.vertical_slash.last_query_sums, stacked.
    """
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    if interpreted(query.device):
        query, key = upcast(query), upcast(key)
    query, key = row_major(query), row_major(key)
    batch, _, num_queries, head_dim = query.shape
    num_keys, count = key.shape[2], len(heads)
    last_queries = num_last_queries or [LAST_QUERIES] * count
    spec = TritonKernelSpec(
        template="last_queries",
        dtype=DTYPES[query.dtype],
        head_dim=head_dim,
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        biased=inputs.distance_bias is not None,
        num_warps=score_warps(head_dim),
        num_stages=2,
        target=target_for(query.device),
    )
    last = last_row(mask, batch, num_queries, query.device)
    sums = torch.zeros(3, batch, count, num_keys, device=key.device)
    statistics = sums.new_empty(2, batch, count, SPLITS, LAST_QUERIES)
    tiles = -(-num_keys // LAST_QUERIES)
    tiles_per_split = max(1, -(-tiles // SPLITS))
    head_of, num_last_of = device_ints([*heads, *last_queries], query.device).split(count)
    arguments = {
        "query": query,
        "key": key,
        "key_mask": mask_bytes(mask, last),
        "last": last,
        "heads": head_of,
        "num_last_queries": num_last_of,
        **strides("query", query),
        **strides("key", key),
        "num_keys": num_keys,
        "num_heads": count,
        "group": inputs.group,
        "query_offset": mask.query_offset,
        "window": mask.window,
        "tiles_per_split": tiles_per_split,
        "scale": inputs.scale * LOG2_E,
        **bias_lines(inputs.distance_bias, num_queries),
    }
    grid = (-(-tiles // tiles_per_split), count, batch)
    maxima, row_sums = statistics
    columns, near, far = sums
    launch(spec, "row_statistics", grid, maxima=maxima, sums=row_sums, **arguments)
    launch(
        spec,
        "sum_probabilities",
        grid,
        column_sums=columns,
        near_sums=near,
        far_sums=far,
        maxima=maxima,
        sums=row_sums,
        **arguments,
    )
    near.add_(far)
    return sums[:2]
