"""Columns that hold a share of the sampled rows' attention, by generated kernels.

The meaning stands in mpass.lowering.reference.sample_attention. Letters: B batch, h heads asked
for, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, R sampled rows, T tiles of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import query_mask
from mpass.lowering.reference.query_rows import evenly_spaced_rows, real_rows
from mpass.lowering.reference.sample_attention import (
    ColumnRule,
    SampleAttentionRule,
    column_rule,
    window_index,
)
from mpass.lowering.reference.selection import running_sums, table_to_list
from mpass.lowering.triton.attention import LOG2_E, mask_bytes
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, strides, target_for
from mpass.lowering.triton.list_blocks import float_bits, group_by_kind
from mpass.lowering.triton.pooled_keys import kernel_inputs
from mpass.lowering.triton.spec import TritonKernelSpec, score_warps
from mpass.lowering.triton.vertical_slash import bias_lines


def sample_attention_index(
    inputs: EstimateInputs, rules: Sequence[SampleAttentionRule]
) -> SparseIndex:
    """As mpass.lowering.reference.sample_attention.

    Heads that sample the same rows are taken together.
    """
    inputs = kernel_inputs(inputs)
    index = window_index(inputs, rules)
    if 0 in (inputs.batch, inputs.num_queries, inputs.num_keys):
        return index
    columns = [column_rule(rule, inputs.num_queries) for rule in rules]
    for rows, places in group_by_kind([rule.rows for rule in columns]):
        sums = sampled_sums(inputs, [inputs.heads[i] for i in places], rows)
        table = top_share_columns(sums, [columns[i] for i in places])
        counts, entries = table_to_list(table, index.column_index.shape[-1])
        # Slices of the rows: places as an index would be a copy from the host.
        for own, rows_of in runs_of(places):
            index.column_count[:, rows_of].copy_(counts[:, own])
            index.column_index[:, rows_of].copy_(entries[:, own])
    return index


def runs_of(places: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Ascending places as few slices: where each stands among them, and the places that it is."""
    start = 0
    for stop in range(1, len(places) + 1):
        if stop == len(places) or places[stop] != places[stop - 1] + 1:
            yield slice(start, stop), slice(places[start], places[stop - 1] + 1)
            start = stop


def top_share_columns(sums: Tensor, rules: Sequence[ColumnRule]) -> Tensor:
    """The fewest keys that hold each rule's coverage of the sums [B, h, Nk]: bool [B, h, Nk]."""
    shares = [rule.coverage if rule.coverage < 1 else math.inf for rule in rules]
    numbers = [*map(float_bits, shares), *(rule.columns for rule in rules)]
    coverage, most = device_ints(numbers, sums.device).view(2, len(rules), 1)
    ordered = sums.sort(dim=-1, descending=True, stable=True)
    before = running_sums(ordered.values) - ordered.values
    kept = before < coverage.view(torch.float32) * sums.sum(-1, keepdim=True)
    kept &= ordered.values > 0
    kept &= torch.arange(sums.shape[-1], device=sums.device) < most
    return torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)


def sampled_sums(inputs: EstimateInputs, heads: Sequence[int], count: int) -> Tensor:
    """Attention of `count` evenly spaced query rows of some heads, summed per key: fp32 [B, h, Nk].

    inputs: as `kernel_inputs` gives them.
    """
    query, key, mask = inputs.query, inputs.key, inputs.mask
    batch, num_queries, num_keys = inputs.batch, inputs.num_queries, inputs.num_keys
    rows = evenly_spaced_rows(real_rows(mask, batch, num_queries, query.device), count)
    num_tiles = -(-count // BLOCK)
    rows = torch.nn.functional.pad(rows, (num_tiles * BLOCK - count, 0), value=-1)
    last_rows = rows.view(batch, num_tiles, BLOCK)[..., -1].int()
    real = query_mask(mask, num_queries)
    if real is not None:
        rows = torch.where(real.gather(1, rows.clamp(min=0)), rows, -1)
    head_of = device_ints(heads, query.device)
    spec = TritonKernelSpec(
        template="sampled_rows",
        dtype=DTYPES[query.dtype],
        head_dim=query.shape[-1],
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        biased=inputs.distance_bias is not None,
        num_warps=score_warps(query.shape[-1]),
        num_stages=2,
        target=target_for(query.device),
    )
    arguments = {
        "query": query,
        "key": key,
        "key_mask": mask_bytes(mask, head_of),
        "row_index": rows.int(),
        "last_rows": last_rows.contiguous(),
        "heads": head_of,
        **strides("query", query),
        **strides("key", key),
        "num_tiles": num_tiles,
        "num_keys": num_keys,
        "heads_per_kv": inputs.group,
        "query_offset": mask.query_offset,
        "window": mask.window,
        "scale": inputs.scale * LOG2_E,
        **bias_lines(inputs.distance_bias, num_queries),
    }
    log_totals = torch.empty(batch, len(heads), num_tiles * BLOCK, device=query.device)
    sums = log_totals.new_empty(batch, len(heads), num_keys)
    grid = (num_tiles, len(heads), batch)
    launch(spec, "row_totals", grid, log_totals=log_totals, **arguments)
    grid = (-(-num_keys // spec.tile), len(heads), batch)
    launch(spec, "sum_columns", grid, column_sums=sums, log_totals=log_totals, **arguments)
    return sums
