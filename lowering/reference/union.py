"""Blocks by estimated attention and vertical columns by that of the last queries, in one index.

Letters: B batch, H query heads, Hk kv heads, h heads asked for, Nq queries, Nk keys, D head_dim,
C query blocks of a chunk, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.distance_bias import run_line
from mpass.lowering.index import IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import candidates, keep_mass, list_index
from mpass.lowering.reference.pooled_keys import pooled_keys, row_scores
from mpass.lowering.reference.query_rows import evenly_spaced_rows, real_rows, row_attention
from mpass.lowering.reference.selection import largest
from mpass.lowering.reference.vertical_slash import last_query_sums


@dataclass(frozen=True, slots=True)
class VerticalBlockRule:
    """What one head keeps; see mpass.patterns.union for the meaning of each number."""

    mass: float
    row_share: float
    columns: int
    sink_blocks: int
    local_blocks: int
    last_blocks: int
    rows: int
    pool: int
    max_blocks: int
    last_queries: int


def vertical_block_index(inputs: EstimateInputs, rules: Sequence[VerticalBlockRule]) -> SparseIndex:
    """The index of `mpass.patterns.union` for the given heads, with one rule per head."""
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    pooled = [
        pooled_keys(key[:, head // inputs.group], mask, rule.pool)
        for head, rule in zip(heads, rules, strict=True)
    ]

    lines = inputs.bias_lines()

    def kept_blocks(i: int, blocks: Tensor) -> Tensor:
        rule, line = rules[i], lines[i]
        scores, greatest = row_scores(
            query[:, heads[i]],
            *pooled[i],
            mask,
            blocks,
            scale=inputs.scale,
            rows=rule.rows,
            pool=rule.pool,
            bias=None if line is None else run_line(line, rule.pool),
        )
        choice = candidates(
            query,
            key,
            mask,
            blocks,
            scores,
            sink_blocks=rule.sink_blocks,
            local_blocks=rule.local_blocks,
            last_blocks=rule.last_blocks,
            max_blocks=rule.max_blocks,
        )
        return keep_mass(choice, rule.mass, greatest >= rule.row_share)

    width = vertical_block_width(rules)
    columns = None
    if width.max_columns:
        looking = [rule.last_queries for rule in rules]
        sums = last_query_sums(inputs, looking)[0] if mask.causal else spread_sums(inputs, looking)
        columns = largest(sums, [rule.columns for rule in rules]) & (sums > 0)
    return list_index(query, mask, len(heads), width, kept_blocks, columns)


def spread_sums(inputs: EstimateInputs, counts: Sequence[int]) -> Tensor:
    """Attention of some evenly spaced queries of each head, summed per key: fp32 [B, h, Nk].

    counts: how many queries of each head look. Where attention is not causal the last queries know
    no more than others, and stand at one edge of the picture.
    """
    bounds = real_rows(inputs.mask, inputs.batch, inputs.num_queries, inputs.query.device)
    sums = [
        row_attention(
            inputs.query[:, head],
            inputs.key[:, head // inputs.group],
            inputs.mask,
            evenly_spaced_rows(bounds, count),
            scale=inputs.scale,
            bias=line,
        )[0].sum(1)
        for head, count, line in zip(inputs.heads, counts, inputs.bias_lines(), strict=True)
    ]
    return torch.stack(sums, 1)


def vertical_block_width(rules: Sequence[VerticalBlockRule]) -> IndexWidth:
    """Buffer sizes of `vertical_block_index`, from the limits alone."""
    return IndexWidth(
        max_blocks=max(rule.max_blocks for rule in rules),
        max_columns=max(rule.columns for rule in rules),
    )
