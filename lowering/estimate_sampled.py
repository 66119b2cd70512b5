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
from mpass.lowering.estimate_rows import real_rows, row_attention, spread_rows
from mpass.lowering.index import BLOCK, AttentionMask
from torch import Tensor

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


def sampled_selection(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[SampledRule],
    *,
    scale: float,
) -> tuple[Tensor, list[int]]:
    """The columns that are kept, bool [B, h, Nk], and the windows in tokens, one per head."""
    group = query.shape[1] // key.shape[1]
    columns = [
        covering_columns(query[:, head], key[:, head // group], mask, rule, scale=scale)
        for head, rule in zip(heads, rules, strict=True)
    ]
    return torch.stack(columns, 1), [window_size(rule, key.shape[2]) for rule in rules]


def window_size(rule: SampledRule, num_keys: int) -> int:
    """Nearest keys that are kept, tokens: a share of the prompt, within the limit."""
    return max(1, min(rule.max_window, math.ceil(rule.window_share * num_keys)))


def max_diagonals(rule: SampledRule) -> int:
    """Block diagonals of the widest window."""
    return (rule.max_window - 1 + BLOCK - 1) // BLOCK + 1


def covering_columns(
    query: Tensor, key: Tensor, mask: AttentionMask, rule: SampledRule, *, scale: float
) -> Tensor:
    """The fewest keys that hold `coverage` of the sampled attention: bool [B, Nk].

    query [B, Nq, D], key [B, Nk, D]. Every (1 / row_share)-th row is looked at, the last included.
    """
    count = max(1, math.ceil(rule.row_share * query.shape[1]))
    rows = spread_rows(real_rows(mask, query.shape[0], query.shape[1], query.device), count)
    sums = torch.zeros(key.shape[0], key.shape[1], device=key.device)
    for some in rows.split(ROWS_AT_ONCE, 1):
        sums += row_attention(query, key, mask, some, scale=scale)[0].sum(1)
    ordered = sums.sort(dim=-1, descending=True, stable=True)
    before = ordered.values.cumsum(-1) - ordered.values
    kept = (before < rule.coverage * sums.sum(-1, keepdim=True)) & (ordered.values > 0)
    kept[:, rule.max_columns :] = False
    return torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)
