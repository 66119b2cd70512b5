"""Blocks of largest mean-pooled score: what `mpass.patterns.block_sparse` means, in plain torch.

MInference 1.0, section 3.2. Letters: B batch, H query heads, Hk kv heads, N positions, Nq queries,
Nk keys, D head_dim, I query blocks, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.distance_bias import pair_line
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    empty_index,
    list_slots,
    num_key_blocks,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.selection import largest, table_to_list


@dataclass(frozen=True, slots=True)
class BlockSparseRule:
    """What one head keeps: the `top_k` best key blocks of `block_size` positions per query block.

    block_size is a multiple of BLOCK.
    """

    top_k: int
    block_size: int = BLOCK


def block_sparse_index(inputs: EstimateInputs, rules: Sequence[BlockSparseRule]) -> SparseIndex:
    """The blocks of largest mean-pooled score, per query block, with one rule per head.

    Queries and keys are averaged over blocks of `rule.block_size` positions; the `rule.top_k` key
    blocks of largest mean query x mean key are kept, the diagonal one always. The scale only
    matters beside a bias by distance.
    """
    mask, rows, columns = inputs.mask, inputs.num_blocks, num_key_blocks(inputs.num_keys)
    per_head = []
    for head, rule, line in zip(inputs.heads, rules, inputs.bias_lines(), strict=True):
        size = rule.block_size
        pooled_query = pooled_means(inputs.query[:, head], size, mask, offset=mask.query_offset)
        pooled_key = pooled_means(inputs.key[:, head // inputs.group], size, mask, offset=0)
        bias = None
        if line is not None:
            origin = mask.query_offset + inputs.num_queries - 1
            bias = pair_line(line, origin, size, pooled_key.shape[1])
        scale = 1.0 if bias is None else inputs.scale
        table = top_k_blocks(pooled_query * scale, pooled_key, mask, size, rule.top_k, bias)
        repeat = size // BLOCK
        table = table.repeat_interleave(repeat, 1).repeat_interleave(repeat, 2)
        first = inputs.first_block
        skip = first % repeat
        table = table[:, skip : skip + rows, :columns]
        if mask.causal:
            blocks = torch.arange(first, first + rows, device=inputs.query.device)
            distance = blocks[:, None] - torch.arange(columns, device=inputs.query.device)
            table = (table | (distance == 0)) & (distance >= 0)
        per_head.append(table)
    tables = torch.stack(per_head, dim=1)
    width = block_sparse_width(rules)
    index = empty_index(inputs.query, rows, width, list_slots(len(inputs.heads)))
    counts, entries = table_to_list(tables, width.max_blocks)
    index.block_count.copy_(counts)
    index.block_index.copy_(entries)
    return index


def block_sparse_width(rules: Sequence[BlockSparseRule]) -> IndexWidth:
    """Buffer sizes of `block_sparse_index`; one more block for a forced diagonal."""
    widest = max((rule.top_k + 1) * rule.block_size // BLOCK for rule in rules)
    return IndexWidth(max_blocks=widest)


def pooled_means(rows: Tensor, block_size: int, mask: AttentionMask, *, offset: int) -> Tensor:
    """Mean of each block of positions: [B, N, D] -> fp32 [B, blocks, D]; padding does not count.

    offset: absolute position of the first row; blocks lie on the absolute grid.
    """
    batch, length, dim = rows.shape
    first = offset // block_size
    lead = offset - first * block_size
    blocks = (lead + length + block_size - 1) // block_size
    tail = blocks * block_size - lead - length
    weight = torch.ones(batch, length, device=rows.device)
    if mask.key_mask is not None and mask.key_mask.shape[1] >= offset + length:
        weight = mask.key_mask[:, offset : offset + length].float()
    padded = torch.nn.functional.pad(rows.float() * weight[..., None], (0, 0, lead, tail))
    weight = torch.nn.functional.pad(weight, (lead, tail))
    sums = padded.view(batch, blocks, block_size, dim).sum(2)
    return sums / weight.view(batch, blocks, block_size).sum(2).clamp(min=1)[..., None]


def top_k_blocks(
    pooled_query: Tensor,
    pooled_key: Tensor,
    mask: AttentionMask,
    block_size: int,
    top_k: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Selected blocks, bool [B, I, J], of pooled queries [B, I, D] and pooled keys [B, J, D].

    bias: `pair_line` of a bias by distance, [2 * J - 1], or None.
    """
    scores = pooled_query @ pooled_key.transpose(1, 2)
    rows = torch.arange(scores.shape[1], device=scores.device) + mask.query_offset // block_size
    distance = rows[:, None] - torch.arange(scores.shape[2], device=scores.device)
    if bias is not None:
        most = scores.shape[2] - 1
        scores += bias[(most - distance).clamp(0, 2 * most)]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        allowed &= distance >= 0
    if mask.window > 0:
        allowed &= (distance - 1) * block_size < mask.window - 1
    scores = scores.masked_fill(~allowed, -torch.inf)
    if mask.causal:
        scores = scores.masked_fill(distance == 0, torch.inf)
    return largest(scores, [top_k] * scores.shape[1]) & allowed
