"""SampleAttention's selection: columns that hold a share of the sampled rows' attention.

Zhu et al., "SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive
Structured Sparse Attention" (arXiv 2406.15486), section 4. Letters: B batch, H query heads, Hk kv
heads, h heads asked for, Nq queries, Nk keys, D head_dim.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.index import (
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    num_query_blocks,
    window_diagonals,
)
from mpass.lowering.reference.query_rows import real_rows, row_attention, spread_rows
from mpass.lowering.reference.vertical_slash import table_to_list

ROWS_AT_ONCE = 64
"""Sampled rows whose weights exist at the same time."""


@dataclass(frozen=True, slots=True)
class SampledRule:
    """What one head keeps; see mpass.patterns.sample_attention for the meaning of each number."""

    coverage: float
    row_share: float
    window_share: float
    max_window: int
    max_columns: int


@dataclass(frozen=True, slots=True)
class ColumnRule:
    """The single keys of one head in a prompt of known length: see `column_rule`.

    coverage: share of the attention of `rows` rows that they hold; columns: at most this many.
    """

    coverage: float
    rows: int
    columns: int


def sampled_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[SampledRule],
    *,
    scale: float,
) -> SparseIndex:
    """The index of `mpass.patterns.sample_attention` for the given heads, one rule each.

    query [B, H, Nq, D], key [B, Hk, Nk, D].
    """
    index = window_index(query, key, mask, rules)
    columns = sampled_columns(query, key, mask, heads, rules, scale=scale)
    counts, entries = table_to_list(columns, index.column_index.shape[-1])
    index.column_count.copy_(counts)
    index.column_index.copy_(entries)
    return index


def sampled_width(rules: Sequence[SampledRule]) -> IndexWidth:
    """Buffer sizes of `sampled_index`, from the limits alone."""
    return IndexWidth(
        max_diagonals=max(window_diagonals(rule.max_window) for rule in rules),
        max_columns=max(rule.max_columns for rule in rules),
    )


def window_index(
    query: Tensor, key: Tensor, mask: AttentionMask, rules: Sequence[SampledRule]
) -> SparseIndex:
    """An index of the nearest keys alone, one rule per head; its columns are to be filled in."""
    blocks = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, blocks, sampled_width(rules), diagonal_slots(len(rules)))
    distances = torch.arange(index.diagonal_index.shape[-1], device=query.device)
    for i, rule in enumerate(rules):
        reach = window_diagonals(window_size(rule, key.shape[2]))
        index.diagonal_count[:, i].fill_(reach)
        index.diagonal_index[:, i] = distances.where(distances < reach, 0)
    return index


def window_size(rule: SampledRule, num_keys: int) -> int:
    """Nearest keys that are kept, tokens: a share of the prompt, within the limit."""
    return max(1, min(rule.max_window, math.ceil(rule.window_share * num_keys)))


def column_rule(rule: SampledRule, num_queries: int) -> ColumnRule:
    """What a rule means for the single keys of a prompt."""
    rows = max(1, math.ceil(rule.row_share * num_queries))
    return ColumnRule(rule.coverage, rows, rule.max_columns)


def sampled_columns(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[SampledRule],
    *,
    scale: float,
) -> Tensor:
    """The single keys that are kept: bool [B, h, Nk]."""
    group = query.shape[1] // key.shape[1]
    columns = [
        covering_columns(
            query[:, head],
            key[:, head // group],
            mask,
            column_rule(rule, query.shape[2]),
            scale=scale,
        )
        for head, rule in zip(heads, rules, strict=True)
    ]
    return torch.stack(columns, 1)


def covering_columns(
    query: Tensor, key: Tensor, mask: AttentionMask, rule: ColumnRule, *, scale: float
) -> Tensor:
    """The fewest keys that hold `coverage` of the sampled attention: bool [B, Nk].

    query [B, Nq, D], key [B, Nk, D]. The rows are spread evenly, the last one included. A coverage
    of 1 keeps every key with any attention.
    """
    real = real_rows(mask, query.shape[0], query.shape[1], query.device)
    rows = spread_rows(real, rule.rows)
    sums = torch.zeros(key.shape[0], key.shape[1], device=key.device)
    for some in rows.split(ROWS_AT_ONCE, 1):
        sums += row_attention(query, key, mask, some, scale=scale)[0].sum(1)
    ordered = sums.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = before < rule.coverage * sums.sum(-1, keepdim=True)
    kept = (kept if rule.coverage < 1 else torch.ones_like(kept)) & (ordered.values > 0)
    kept[:, rule.columns :] = False
    return torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)
