"""SampleAttention's selection: columns that hold a share of the sampled rows' attention.

Zhu et al., "SampleAttention: Near-Lossless Acceleration of Long Context LLM Inference with Adaptive
Structured Sparse Attention" (arXiv 2406.15486), section 4. Letters: B batch, H query heads, Hk kv
heads, h heads asked for, Nq queries, Nk keys, D head_dim.
"""

from __future__ import annotations

import itertools
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
    window_diagonals,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.query_rows import evenly_spaced_rows, real_rows, row_attention
from mpass.lowering.reference.selection import running_sums, table_to_list

ROWS_AT_ONCE = 64
"""Sampled rows whose weights exist at the same time."""


@dataclass(frozen=True, slots=True)
class SampleAttentionRule:
    """What one head keeps; see mpass.patterns.sample_attention for the meaning of each number."""

    coverage: float
    row_share: float
    window_share: float
    max_window: int
    max_columns: int


@dataclass(frozen=True, slots=True)
class ColumnRule:
    """The vertical columns of one head in a prompt of known length: see `column_rule`.

    coverage: share of the attention of `rows` rows that they hold; columns: at most this many.
    """

    coverage: float
    rows: int
    columns: int


def sample_attention_index(
    inputs: EstimateInputs, rules: Sequence[SampleAttentionRule]
) -> SparseIndex:
    """The index of `mpass.patterns.sample_attention`, with one rule per head."""
    index = window_index(inputs, rules)
    columns = sample_attention_columns(inputs, rules)
    counts, entries = table_to_list(columns, index.column_index.shape[-1])
    index.column_count.copy_(counts)
    index.column_index.copy_(entries)
    return index


def sample_attention_width(rules: Sequence[SampleAttentionRule]) -> IndexWidth:
    """Buffer sizes of `sample_attention_index`, from the limits alone."""
    return IndexWidth(
        # As many blocks ahead, where attention is not causal.
        max_diagonals=max(2 * window_diagonals(rule.max_window) - 1 for rule in rules),
        max_columns=max(rule.max_columns for rule in rules),
    )


def window_index(inputs: EstimateInputs, rules: Sequence[SampleAttentionRule]) -> SparseIndex:
    """An index of the nearest keys alone, one rule per head; its columns are to be filled in."""
    query, width = inputs.query, sample_attention_width(rules)
    index = empty_index(query, inputs.num_blocks, width, diagonal_slots(len(rules)))
    distances = torch.arange(index.diagonal_index.shape[-1], device=query.device)
    reaches = [window_diagonals(window_size(rule, inputs.num_keys)) for rule in rules]
    first = 0
    for reach, run in itertools.groupby(reaches):
        own = slice(first, first := first + len(list(run)))
        ahead = 0 if inputs.mask.causal else reach - 1
        index.diagonal_count[:, own].fill_(reach + ahead)
        shown = distances - ahead if ahead else distances
        index.diagonal_index[:, own] = shown.where(distances < reach + ahead, 0)
    return index


def window_size(rule: SampleAttentionRule, num_keys: int) -> int:
    """Nearest keys that are kept, tokens: a share of the prompt, within the limit."""
    return max(1, min(rule.max_window, math.ceil(rule.window_share * num_keys)))


def column_rule(rule: SampleAttentionRule, num_queries: int) -> ColumnRule:
    """What a rule means for the vertical columns of a prompt."""
    rows = max(1, math.ceil(rule.row_share * num_queries))
    return ColumnRule(rule.coverage, rows, rule.max_columns)


def sample_attention_columns(
    inputs: EstimateInputs, rules: Sequence[SampleAttentionRule]
) -> Tensor:
    """The vertical columns that are kept: bool [B, h, Nk]."""
    columns = [
        top_share_columns(
            inputs.query[:, head],
            inputs.key[:, head // inputs.group],
            inputs.mask,
            column_rule(rule, inputs.num_queries),
            scale=inputs.scale,
            bias=line,
        )
        for head, rule, line in zip(inputs.heads, rules, inputs.bias_lines(), strict=True)
    ]
    return torch.stack(columns, 1)


def top_share_columns(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    rule: ColumnRule,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> Tensor:
    """The fewest keys that hold `coverage` of the sampled attention: bool [B, Nk].

    query [B, Nq, D], key [B, Nk, D]; bias: by distance, [L], or None. The rows are evenly spaced,
    the last one included. A coverage of 1 keeps every key with any attention.
    """
    real = real_rows(mask, query.shape[0], query.shape[1], query.device)
    rows = evenly_spaced_rows(real, rule.rows)
    sums = torch.zeros(key.shape[0], key.shape[1], device=key.device)
    for some in rows.split(ROWS_AT_ONCE, 1):
        sums += row_attention(query, key, mask, some, scale=scale, bias=bias)[0].sum(1)
    ordered = sums.sort(dim=-1, descending=True, stable=True)
    before = running_sums(ordered.values) - ordered.values
    kept = before < rule.coverage * sums.sum(-1, keepdim=True)
    kept = (kept if rule.coverage < 1 else torch.ones_like(kept)) & (ordered.values > 0)
    kept[:, rule.columns :] = False
    return torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)
