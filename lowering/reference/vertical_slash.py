"""Vertical columns and slashes from the last queries: what `mpass.patterns.vertical_slash` means.

MInference 1.0, section 3.2, in plain torch. Letters: B batch, h heads asked for, H query heads, Hk
kv heads, Nq queries, Nk keys, D head_dim, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    num_key_blocks,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import allowed_cells, estimated_softmax
from mpass.lowering.reference.selection import (
    LAST_QUERIES,
    first_keys,
    largest,
    last_rows,
    table_to_list,
)

SINK_COLUMNS = 30
"""First keys that vertical-slash always keeps (MInference's released code)."""

LOCAL_DIAGONALS = 100
"""Nearest token distances that vertical-slash always keeps (MInference's released code)."""


@dataclass(frozen=True, slots=True)
class VerticalSlashRule:
    """What one head keeps: how many vertical columns (keys), and how many token diagonals."""

    vertical_size: int
    slash_size: int


def vertical_slash_index(inputs: EstimateInputs, rules: Sequence[VerticalSlashRule]) -> SparseIndex:
    """Columns and diagonals with the most attention of the last queries, with one rule per head.

    Every token diagonal s that is kept selects the two block diagonals that its cells lie in,
    s // BLOCK and ceil(s / BLOCK).
    """
    columns, diagonals = vertical_slash_selection(inputs, rules)
    width = vertical_slash_width(rules)
    return diagonal_index(
        inputs.query, inputs.num_blocks, columns, block_diagonals(diagonals), width
    )


def vertical_slash_width(rules: Sequence[VerticalSlashRule]) -> IndexWidth:
    """Buffer sizes of `vertical_slash_index`, from the budgets alone."""
    return IndexWidth(
        max_diagonals=2 * max(LOCAL_DIAGONALS, *(rule.slash_size for rule in rules)) + 1,
        max_columns=max(SINK_COLUMNS, *(rule.vertical_size for rule in rules)),
    )


def vertical_slash_selection(
    inputs: EstimateInputs, rules: Sequence[VerticalSlashRule]
) -> tuple[Tensor, Tensor]:
    """The keys [B, h, Nk] and token distances [B, h, Nk] that are kept, as bool tables.

    The first SINK_COLUMNS keys and the LOCAL_DIAGONALS nearest distances are kept first and count
    towards the budgets, which are at least that large (minference.md's size clamp).
    """
    column_sums, diagonal_sums = last_query_sums(inputs)
    key, mask, num_keys = inputs.key, inputs.mask, inputs.num_keys
    start = first_keys(mask, inputs.batch, key.device)
    positions = torch.arange(num_keys, device=key.device)
    sinks = (positions - start[:, None] >= 0) & (positions - start[:, None] < SINK_COLUMNS)
    column_sums = column_sums.masked_fill(sinks[:, None, :], torch.inf)
    diagonal_sums = diagonal_sums.masked_fill(positions < LOCAL_DIAGONALS, torch.inf)
    columns = largest(column_sums, [max(SINK_COLUMNS, rule.vertical_size) for rule in rules])
    diagonals = largest(diagonal_sums, [max(LOCAL_DIAGONALS, rule.slash_size) for rule in rules])
    if mask.window > 0:
        diagonals &= positions < mask.window
    return columns, diagonals


def last_query_sums(
    inputs: EstimateInputs, num_last_queries: Sequence[int] | None = None
) -> tuple[Tensor, Tensor]:
    """Attention of the last queries, summed per key and per distance: two fp32 [B, h, Nk].

    The last LAST_QUERIES queries that are not padding look, per batch row, or the last
    `num_last_queries[i]` of them for the head `inputs.heads[i]`. Entry s of the second result is
    the sum over the pairs with `query position - key position == s`.
    """
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    num_keys = inputs.num_keys
    rows = last_rows(mask, inputs.batch, inputs.num_queries, query.device)
    picked = query[:, list(heads)].float()
    picked = picked.gather(
        2, rows[:, None, :, None].clamp(min=0).expand(*picked.shape[:2], -1, picked.shape[-1])
    )
    keys = key[:, [head // inputs.group for head in heads]].float()
    scores = picked @ keys.transpose(-1, -2) * inputs.scale
    for i, line in enumerate(inputs.bias_lines()):
        if line is not None:
            scores[:, i] += bias_rows(line, rows.clamp(min=0), inputs.num_queries, 0, num_keys)

    positions = rows + mask.query_offset
    visible = torch.stack(
        [
            allowed_cells(AttentionMask(mask.causal, 0, mask.window), p, num_keys)[0]
            for p in positions
        ]
    )
    if mask.key_mask is not None:
        visible = visible & mask.key_mask[:, None, None, :]
    visible = visible & (rows >= 0)[:, None, :, None]
    if num_last_queries is not None:
        back = torch.arange(LAST_QUERIES, 0, -1, device=key.device)
        recent = back <= torch.tensor(list(num_last_queries), device=key.device)[:, None]
        visible = visible & recent[:, :, None]
    probabilities = estimated_softmax(scores, visible)

    # Gathered per distance, not scattered per key: atomics would add in another order each time.
    keys = positions[:, :, None] - torch.arange(num_keys, device=key.device)
    there = ((keys >= 0) & (keys < num_keys))[:, None]
    keys = keys.clamp(0, num_keys - 1)[:, None].expand_as(probabilities)
    return probabilities.sum(2), probabilities.gather(3, keys).where(there, 0.0).sum(2)


def block_diagonals(diagonals: Tensor) -> Tensor:
    """Token distances [B, h, Nk] -> block distances [B, h, J + 1] that hold their cells (bool)."""
    num_keys = diagonals.shape[-1]
    size = num_key_blocks(num_keys) + 1
    padded = torch.nn.functional.pad(diagonals, (0, size * BLOCK - num_keys))
    tiles = padded.view(*diagonals.shape[:-1], size, BLOCK)
    table = tiles.any(-1)
    table[..., 1:] |= tiles[..., :-1, 1:].any(-1)
    table[..., 0] = True
    return table


def diagonal_index(
    query: Tensor, num_rows: int, columns: Tensor, diagonals: Tensor, width: IndexWidth
) -> SparseIndex:
    """An index in diagonal form from bool tables of keys [B, h, Nk] and block distances."""
    index = empty_index(query, num_rows, width, diagonal_slots(columns.shape[1]))
    for table, count, entries in (
        (diagonals, index.diagonal_count, index.diagonal_index),
        (columns, index.column_count, index.column_index),
    ):
        counts, indices = table_to_list(table, entries.shape[-1])
        count.copy_(counts)
        entries.copy_(indices)
    return index
