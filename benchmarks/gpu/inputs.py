"""Inputs of the GPU benchmark: random attentions and indexes of a given density.

Letters: B batch, H query heads, Hk kv heads, N positions, D head_dim, I query blocks.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.index import (
    ALL_BLOCKS,
    ALL_DIAGONALS,
    BLOCK,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    list_slots,
    num_query_blocks,
)


@dataclass(frozen=True)
class Shape:
    """One prefill attention: a Llama-3.1-8B layer unless said otherwise."""

    length: int
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    dtype: torch.dtype = torch.bfloat16

    def tensors(self, device: torch.device, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """Random query [1, H, N, D], key and value [1, Hk, N, D], laid out as [1, N, H, D]."""
        generator = torch.Generator(device).manual_seed(seed)

        def normal(heads: int) -> Tensor:
            size = (1, self.length, heads, self.head_dim)
            data = torch.empty(size, dtype=self.dtype, device=device)
            return data.normal_(generator=generator).transpose(1, 2)

        return normal(self.heads), normal(self.kv_heads), normal(self.kv_heads)

    @property
    def dense_flops(self) -> float:
        """Multiply-adds of causal attention, counted as two operations each."""
        return 2.0 * self.length**2 * self.head_dim * self.heads


def planted_tensors(
    shape: Shape,
    device: torch.device,
    *,
    seed: int = 0,
    local: float = 14.0,
    sink: float = 10.0,
    spikes: int = 48,
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [1, H, N, D], key and value [1, Hk, N, D] with what makes a model's attention sparse.

    Rotary embeddings of one common direction make near keys likely (`local`: its logit at distance
    0, more for later heads); half of the queries look for a probe that `spikes` keys of each kv
    head carry, the first ones among them (`sink`: its logit). The rest is unit noise.
    """
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, device=device)

    length, heads, kv_heads, dim = shape.length, shape.heads, shape.kv_heads, shape.head_dim
    frequencies = 5e5 ** (-torch.arange(dim // 2, device=device) / (dim // 2))
    angles = torch.arange(length, device=device)[:, None] * frequencies
    cosine, sine = angles.cos(), angles.sin()

    def rotate(tensor: Tensor) -> Tensor:
        first, second = tensor.chunk(2, -1)
        return torch.cat([first * cosine - second * sine, first * sine + second * cosine], -1)

    common, probe = (
        torch.nn.functional.normalize(normal(kv_heads, 1, dim), dim=-1) for _ in range(2)
    )
    gain, lift = (logit**0.5 * dim**0.25 for logit in (local, sink))
    query, key, value = (
        torch.empty(1, length, count, dim, dtype=shape.dtype, device=device).transpose(1, 2)
        for count in (heads, kv_heads, kv_heads)
    )
    keys = rotate(common * gain + normal(kv_heads, length, dim))
    places = torch.randint(0, length, (kv_heads, spikes), generator=generator, device=device)
    places[:, :4] = torch.arange(4, device=device)
    keys.scatter_add_(
        1, places[..., None].expand(-1, -1, dim), (probe * lift).expand(-1, spikes, -1)
    )
    key[0], value[0] = keys, normal(kv_heads, length, dim)
    for head in range(heads):  # one at a time: all heads of a million tokens in fp32 are large
        kv_head = head * kv_heads // heads
        strength = gain * (0.6 + 0.8 * head / max(1, heads - 1))
        searching = torch.rand(length, 1, generator=generator, device=device) < 0.5
        near = rotate(common[kv_head] * strength + normal(length, dim))
        query[0, head] = near + probe[kv_head] * lift * searching
    return query, key, value


def list_index(query: Tensor, density: float | Sequence[float], seed: int = 0) -> SparseIndex:
    """Random block lists: row r of a head selects `density` of its r + 1 blocks, its own always.

    density: of all heads, or of each. Entries are one random block out of each of equal stretches,
    so that they ascend by themselves.
    """
    _, heads, length, _ = query.shape
    shares = [density] * heads if isinstance(density, float) else list(density)
    rows = num_query_blocks(length, 0)
    width = math.ceil(max(shares) * rows) + 1
    index = empty_index(query, rows, IndexWidth(max_blocks=width), list_slots(heads))
    device = query.device
    generator = torch.Generator(device).manual_seed(seed)
    seen = torch.arange(1, rows + 1, device=device)  # blocks that a row may select
    places = torch.arange(width, device=device)
    for head, share in enumerate(shares):  # one at a time: a million tokens' lists are large
        counts = (seen * share).ceil().long().clamp(1, width)
        first = places * seen[:, None] // counts[:, None]
        size = (places + 1) * seen[:, None] // counts[:, None] - first
        jitter = torch.rand(rows, width, generator=generator, device=device)
        entries = first + (jitter * size).long()
        entries = torch.where(places == counts[:, None] - 1, (seen - 1)[:, None], entries)
        index.block_index[0, head] = torch.where(places < counts[:, None], entries, 0)
        index.block_count[0, head] = counts
    return index


def dense_index(query: Tensor) -> SparseIndex:
    """Every block of every head: what the kernel costs at density 1."""
    heads = query.shape[1]
    rows = num_query_blocks(query.shape[2], 0)
    index = empty_index(query, rows, IndexWidth(max_diagonals=1), diagonal_slots(heads))
    index.diagonal_count.fill_(ALL_DIAGONALS)
    return index


def computed_flops(index: SparseIndex, length: int, head_dim: int) -> float:
    """Operations of the tiles that the kernel computes, diagonal blocks counted whole.

    Reads the index: not for timed code. Columns count once per query block after them.
    """
    rows = num_query_blocks(length, 0)
    row_numbers = torch.arange(rows, device=index.block_count.device)
    listed = torch.where(index.block_count == ALL_BLOCKS, row_numbers + 1, index.block_count)
    lists = listed.sum((0, 2)).tolist()
    blocks = float(sum(lists[slot] for slot in index.head_slots if slot >= 0))
    for slot in (s for s in index.head_slots if s < 0):
        count = int(index.diagonal_count[0, -1 - slot])
        if count == ALL_DIAGONALS:
            blocks += rows * (rows + 1) / 2
            continue
        distances = index.diagonal_index[0, -1 - slot, :count]
        seen = row_numbers[:, None] - distances  # blocks ahead have negative distances
        blocks += float(((seen >= 0) & (seen < rows)).sum())
    columns = 0.0
    for head in range(len(index.head_slots)):
        kept = index.column_index[0, head, : int(index.column_count[0, head])]
        columns += float((rows - 1 - kept // BLOCK).clamp(min=0).sum())
    return 4.0 * head_dim * (blocks * BLOCK * BLOCK + columns * BLOCK)
