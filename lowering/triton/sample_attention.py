"""Columns that hold a share of the sampled rows' attention, by generated kernels.

The meaning stands in mpass.lowering.reference.sample_attention. Letters: B batch, h heads asked
for, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, R sampled rows, T tiles of them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex
from mpass.lowering.reference.block_lists import query_mask
from mpass.lowering.reference.query_rows import real_rows, spread_rows
from mpass.lowering.reference.sample_attention import (
    ColumnRule,
    SampledRule,
    column_rule,
    window_index,
)
from mpass.lowering.reference.vertical_slash import table_to_list
from mpass.lowering.triton.attention import LOG2_E, mask_bytes
from mpass.lowering.triton.block_scores import alike, float_bits
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, target_for
from mpass.lowering.triton.pooled_keys import kernel_inputs
from mpass.lowering.triton.spec import KernelSpec, score_warps


def sampled_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[SampledRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.sample_attention.sampled_index.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; rules: one per head of `heads`. Heads that sample the
    same rows are taken together.
    """
    query, key = kernel_inputs(query, key)
    index = window_index(query, key, mask, rules)
    if 0 in (query.shape[0], query.shape[2], key.shape[2]):
        return index
    columns = [column_rule(rule, query.shape[2]) for rule in rules]
    for rows, places in alike([rule.rows for rule in columns]):
        sums = sampled_sums(query, key, mask, [heads[i] for i in places], rows, scale=scale)
        table = covering_columns(sums, [columns[i] for i in places])
        counts, entries = table_to_list(table, index.column_index.shape[-1])
        # Head by head: places as an index would be a copy from the host.
        for i, count, entry in zip(places, counts.unbind(1), entries.unbind(1), strict=True):
            index.column_count[:, i].copy_(count)
            index.column_index[:, i].copy_(entry)
    return index


def covering_columns(sums: Tensor, rules: Sequence[ColumnRule]) -> Tensor:
    """The fewest keys that hold each rule's coverage of the sums [B, h, Nk]: bool [B, h, Nk]."""
    shares = [rule.coverage if rule.coverage < 1 else math.inf for rule in rules]
    numbers = [*map(float_bits, shares), *(rule.columns for rule in rules)]
    coverage, most = device_ints(numbers, sums.device).view(2, len(rules), 1)
    ordered = sums.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = before < coverage.view(torch.float32) * sums.sum(-1, keepdim=True)
    kept &= ordered.values > 0
    kept &= torch.arange(sums.shape[-1], device=sums.device) < most
    return torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)


def sampled_sums(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    count: int,
    *,
    scale: float,
) -> Tensor:
    """Attention of `count` query rows, spread evenly, summed per key: fp32 [B, h, Nk].

    query [B, H, Nq, D], key [B, Hk, Nk, D], as `kernel_inputs` gives them.
    """
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    rows = spread_rows(real_rows(mask, batch, num_queries, query.device), count)
    num_tiles = -(-count // BLOCK)
    rows = torch.nn.functional.pad(rows, (num_tiles * BLOCK - count, 0), value=-1)
    last_rows = rows.view(batch, num_tiles, BLOCK)[..., -1].int()
    real = query_mask(mask, num_queries)
    if real is not None:
        rows = torch.where(real.gather(1, rows.clamp(min=0)), rows, -1)
    head_of = device_ints(heads, query.device)
    spec = KernelSpec(
        template="sampled_rows",
        dtype=DTYPES[query.dtype],
        head_dim=query.shape[-1],
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        num_warps=score_warps(query.shape[-1]),
        num_stages=2,
        target=target_for(query.device),
    )
    arguments = (
        query,
        key,
        mask_bytes(mask, head_of),
        rows.int(),
        last_rows.contiguous(),
        head_of,
        *query.stride()[:3],
        *key.stride()[:3],
        num_tiles,
        num_keys,
        query.shape[1] // key.shape[1],
        mask.query_offset,
        mask.window,
        scale * LOG2_E,
    )
    log_totals = torch.empty(batch, len(heads), num_tiles * BLOCK, device=query.device)
    sums = log_totals.new_empty(batch, len(heads), num_keys)
    launch(spec, "row_totals", (num_tiles, len(heads), batch), log_totals, *arguments)
    grid = (-(-num_keys // spec.tile), len(heads), batch)
    launch(spec, "sum_columns", grid, sums, log_totals, *arguments)
    return sums
