"""Scores of key blocks from sums along antidiagonals: XAttention (ICML 2025), section 2.

Queries and keys are taken in groups of `stride` consecutive positions. The product of a group of
queries in reversed order with a group of keys, laid out as one long vector each, is the sum of one
antidiagonal of their stride x stride tile: every vertical and every diagonal line of attention
crosses it. Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, C tiles
of a chunk, J key blocks, T groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.distance_bias import antidiagonal_line
from mpass.lowering.index import AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import estimated_softmax
from mpass.lowering.reference.block_lists import (
    candidates,
    keep_mass,
    list_index,
    query_mask,
    tiled,
)


@dataclass(frozen=True, slots=True)
class XAttentionRule:
    """What one head keeps; see mpass.patterns.x_attention for the meaning of each number."""

    threshold: float
    stride: int
    block_size: int
    sink_blocks: int
    local_blocks: int
    last_blocks: int
    max_blocks: int


def x_attention_index(inputs: EstimateInputs, rules: Sequence[XAttentionRule]) -> SparseIndex:
    """The index of `mpass.patterns.x_attention` for the given heads, with one rule per head."""
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    keys = [
        key_groups(key[:, head // inputs.group], mask, rule.stride, rule.block_size)
        for head, rule in zip(heads, rules, strict=True)
    ]

    lines = inputs.bias_lines()

    def kept_tiles(i: int, tiles: Tensor) -> Tensor:
        rule, line = rules[i], lines[i]
        scores = x_attention_scores(
            query[:, heads[i]],
            *keys[i],
            mask,
            tiles,
            scale=inputs.scale,
            stride=rule.stride,
            block_size=rule.block_size,
            bias=line,
        )
        choice = candidates(
            query,
            key,
            mask,
            tiles,
            scores,
            sink_blocks=rule.sink_blocks,
            local_blocks=rule.local_blocks,
            last_blocks=rule.last_blocks,
            max_blocks=rule.max_blocks,
            block_size=rule.block_size,
        )
        return keep_mass(choice, rule.threshold)

    def kept_blocks(i: int, blocks: Tensor) -> Tensor:
        return tiled(kept_tiles, rules[i].block_size, mask, key.shape[2])(i, blocks)

    return list_index(query, mask, len(heads), x_attention_width(rules), kept_blocks)


def x_attention_width(rules: Sequence[XAttentionRule]) -> IndexWidth:
    """Buffer sizes of `x_attention_index`, from the limits alone."""
    return IndexWidth(max_blocks=max(rule.max_blocks for rule in rules))


def key_groups(
    key: Tensor, mask: AttentionMask, stride: int, block_size: int
) -> tuple[Tensor, Tensor]:
    """Keys of each group in one row, fp32 [B, T, stride * D], and whether any is real, bool [B, T].

    key: [B, Nk, D]; padding and what lies beyond the last key are zeros. Whole blocks are covered.
    """
    batch, num_keys, dim = key.shape
    real = torch.ones(batch, num_keys, dtype=torch.bool, device=key.device)
    if mask.key_mask is not None:
        real = mask.key_mask
    tail = (num_keys + block_size - 1) // block_size * block_size - num_keys
    rows = torch.nn.functional.pad(key.float() * real[..., None], (0, 0, 0, tail))
    exists = torch.nn.functional.pad(real, (0, tail)).view(batch, -1, stride).any(-1)
    return rows.reshape(batch, -1, stride * dim), exists


def x_attention_scores(
    query: Tensor,
    keys: Tensor,
    exists: Tensor,
    mask: AttentionMask,
    tiles: Tensor,
    *,
    scale: float,
    stride: int,
    block_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Attention between groups, summed over each tile and key block: fp32 [B, C, J].

    query [B, Nq, D]; keys and exists of `key_groups`; tiles: [C], of block_size positions. Group i
    of queries gives group j of keys the logit of the mean of their antidiagonal and sees j <= i.
    bias: by distance, [L], or None.
    """
    batch, num_queries, dim = query.shape
    positions = tiles[:, None] * block_size + torch.arange(block_size, device=tiles.device)
    local = positions - mask.query_offset
    counted = ((local >= 0) & (local < num_queries)).expand(batch, -1, -1)
    local = local.clamp(0, num_queries - 1)
    real = query_mask(mask, num_queries)
    if real is not None:
        counted = counted & real[:, local]
    rows = query[:, local].float() * counted[..., None]
    per_tile = block_size // stride
    rows = rows.view(batch, len(tiles), per_tile, stride, dim).flip(3)
    logits = rows.reshape(batch, -1, stride * dim) @ keys.transpose(1, 2) * (scale / stride)

    groups = tiles[:, None] * per_tile + torch.arange(per_tile, device=tiles.device)
    distance = groups[..., None] - torch.arange(keys.shape[1], device=tiles.device)
    if bias is not None:
        line = antidiagonal_line(bias, mask.query_offset + num_queries - 1, stride, keys.shape[1])
        most = keys.shape[1] - 1
        logits += line[(most - distance).clamp(0, 2 * most)].flatten(0, 1)
    visible = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        visible &= distance >= 0
    if mask.window > 0:
        visible &= distance * stride < mask.window
    logits = logits.view(batch, len(tiles), per_tile, -1)
    weights = estimated_softmax(logits, visible & exists[:, None, None, :])
    has_query = counted.view(batch, len(tiles), per_tile, stride).any(-1)
    weights = (weights * has_query[..., None]).sum(2)
    return weights.unflatten(-1, (-1, per_tile)).sum(-1)
