"""The index format that all patterns speak: which keys each block of queries looks at.

Positions are absolute (a query row `r` of a chunk that starts after `query_offset` cached keys has
position `query_offset + r`), and one grid of `BLOCK` positions serves queries and keys, so a chunk
whose offset is no multiple of `BLOCK` only has a partial first query block.

A head selects whole key blocks in one of two forms, and vertical columns (single keys) on top:

- *lists*: per query block, a count and up to `max_blocks` key blocks (block-sparse kinds); a count
  of `ALL_BLOCKS` means every one, whatever the lists hold;
- *diagonals*: block distances `query block - key block`, the same for all query blocks (A-shape,
  vertical-slash: O(diagonals) per head at any length); negative ones, of blocks ahead, where
  attention is not causal; a count of `ALL_DIAGONALS` means every one;
- *vertical columns*: single keys, seen by every query block that lies after them and does not
  already select their block. A column at or after the first position of a query block is not seen
  by it.

What is computed for one query block is the selected blocks, then the columns, everything cut by the
`AttentionMask`. Letters: B batch, H query heads, L heads in list form, G heads in diagonal form,
I query blocks, N positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 64
"""Positions per block of queries and of keys."""

ALL_BLOCKS = -1
"""A `block_count` of this value selects every key block that the mask allows (dense last rows)."""

ALL_DIAGONALS = -1
"""A `diagonal_count` of this value selects every block diagonal (dense, or all of a window)."""


@dataclass(frozen=True, slots=True, eq=False)
class AttentionMask:
    """Which keys a query may see before any sparsity.

    Query at position p sees the key at position j iff all of these hold: `j <= p` if `causal`;
    `p - j < window` if `window > 0`, and without causality `j - p < window` as well;
    `key_mask[b, j]` if there is one.

    causal: False only for bidirectional attention (then query_offset is 0).
    query_offset: number of keys before the first query (cached prefix); an int or a SymInt.
    window: sliding window in positions, the query's own included; 0 for none. It reaches as far
    ahead as back where attention is not causal.
    key_mask: bool [B, Nk], False for padding; None when all keys are real.
    """

    causal: bool = True
    query_offset: int = 0
    window: int = 0
    key_mask: Tensor | None = None


@dataclass(frozen=True, slots=True)
class IndexWidth:
    """Static sizes of an index's buffers: no data decides a shape."""

    max_blocks: int = 0
    max_diagonals: int = 0
    max_columns: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class SparseIndex:
    """What each query block of each head looks at; int32, contiguous, on the query's device.

    block_count     [B, L, I]              key blocks of a query block, <= max_blocks; or ALL_BLOCKS
    block_index     [B, L, I, max_blocks]  ascending, without duplicates; beyond the count: 0
    diagonal_count  [B, G]                 or ALL_DIAGONALS
    diagonal_index  [B, G, max_diagonals]  ascending block distances; beyond the count: 0
    column_count    [B, H]
    column_index    [B, H, max_columns]    ascending key positions; beyond the count: 0
    head_slots      per head: l >= 0 is row l of the lists, -1 - g is row g of the diagonals

    Heads that share a row select the same keys: their columns are equal too. For causal attention
    the diagonal block (distance 0) is always selected, so that every query sees at least its own
    position, and no selected block lies after the query block.
    """

    block_count: Tensor
    block_index: Tensor
    diagonal_count: Tensor
    diagonal_index: Tensor
    column_count: Tensor
    column_index: Tensor
    head_slots: tuple[int, ...]

    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The six tensors in the order in which every op takes and returns them."""
        return (
            self.block_count,
            self.block_index,
            self.diagonal_count,
            self.diagonal_index,
            self.column_count,
            self.column_index,
        )

    def num_bytes(self) -> int:
        """Memory that the index takes."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors())


def first_query_block(query_offset: int) -> int:
    """Block (on the absolute grid) that holds the first query."""
    return query_offset // BLOCK


def num_query_blocks(num_queries: int, query_offset: int) -> int:
    """Blocks of the absolute grid that hold `num_queries` queries; works on SymInts."""
    return (query_offset + num_queries + BLOCK - 1) // BLOCK - query_offset // BLOCK


def num_key_blocks(num_keys: int) -> int:
    """Blocks that hold `num_keys` keys; works on SymInts."""
    return (num_keys + BLOCK - 1) // BLOCK


def window_diagonals(window_size: int) -> int:
    """Block diagonals that hold the token distances 0 .. window_size - 1."""
    return (window_size - 1 + BLOCK - 1) // BLOCK + 1


def list_slots(num_heads: int) -> tuple[int, ...]:
    """`head_slots` when every head is in list form."""
    return tuple(range(num_heads))


def diagonal_slots(num_heads: int) -> tuple[int, ...]:
    """`head_slots` when every head is in diagonal form."""
    return tuple(-1 - head for head in range(num_heads))


def count_rows(head_slots: Sequence[int]) -> tuple[int, int]:
    """How many rows of lists and of diagonals `head_slots` name: every row up to the last one."""
    return max([-1, *head_slots]) + 1, -min([0, *head_slots])


def empty_index(
    query: Tensor, num_blocks: int, width: IndexWidth, head_slots: Sequence[int]
) -> SparseIndex:
    """An index that selects nothing, of the given sizes: zero counts, zero entries.

    query: [B, H', N, D], for batch and device only; num_blocks: I. Also serves as the fake.
    """
    batch = query.shape[0]
    lists, diagonals = count_rows(head_slots)

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.int32, device=query.device)

    return SparseIndex(
        block_count=zeros(batch, lists, num_blocks),
        block_index=zeros(batch, lists, num_blocks, width.max_blocks),
        diagonal_count=zeros(batch, diagonals),
        diagonal_index=zeros(batch, diagonals, width.max_diagonals),
        column_count=zeros(batch, len(head_slots)),
        column_index=zeros(batch, len(head_slots), width.max_columns),
        head_slots=tuple(head_slots),
    )


def whole_index(
    query: Tensor, num_blocks: int, width: IndexWidth, head_slots: Sequence[int]
) -> SparseIndex:
    """An index of the given sizes that selects all that the mask allows.

    query: [B, H', N, D], for batch and device only; num_blocks: I.
    """
    index = empty_index(query, num_blocks, width, head_slots)
    index.block_count.fill_(ALL_BLOCKS)
    index.diagonal_count.fill_(ALL_DIAGONALS)
    return index


def join_indexes(parts: Sequence[SparseIndex], heads: Sequence[Sequence[int]]) -> SparseIndex:
    """One index of all heads of a layer from parts that cover some heads each.

    parts: indexes of the same batch and query blocks; heads: per part, the query heads that its
    rows stand for, in order. Together they name every head once.
    """

    def concatenate(tensors: list[Tensor]) -> Tensor:
        width = max(tensor.shape[-1] for tensor in tensors)
        padded = [torch.nn.functional.pad(t, (0, width - t.shape[-1])) for t in tensors]
        return torch.cat(padded, dim=1)

    joined_heads = [head for part_heads in heads for head in part_heads]
    order = sorted(range(len(joined_heads)), key=joined_heads.__getitem__)
    columns = concatenate([part.column_index for part in parts]).unbind(1)
    counts = torch.cat([part.column_count for part in parts], dim=1).unbind(1)
    return SparseIndex(
        block_count=torch.cat([part.block_count for part in parts], dim=1),
        block_index=concatenate([part.block_index for part in parts]),
        diagonal_count=torch.cat([part.diagonal_count for part in parts], dim=1),
        diagonal_index=concatenate([part.diagonal_index for part in parts]),
        # Stacked, not indexed by a list: that would copy from the host, which no graph captures.
        column_count=torch.stack([counts[i] for i in order], dim=1),
        column_index=torch.stack([columns[i] for i in order], dim=1),
        head_slots=join_slots([part.head_slots for part in parts], heads),
    )


def join_slots(
    head_slots: Sequence[Sequence[int]], heads: Sequence[Sequence[int]]
) -> tuple[int, ...]:
    """`head_slots` of the joined index, from those of the parts and the heads they stand for."""
    slots: dict[int, int] = {}
    num_lists = num_diagonals = 0
    for part_slots, part_heads in zip(head_slots, heads, strict=True):
        for slot, head in zip(part_slots, part_heads, strict=True):
            slots[head] = num_lists + slot if slot >= 0 else slot - num_diagonals
        lists, diagonals = count_rows(part_slots)
        num_lists, num_diagonals = num_lists + lists, num_diagonals + diagonals
    return tuple(slots[head] for head in range(len(slots)))
