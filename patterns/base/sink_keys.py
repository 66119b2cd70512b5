"""The first keys of a prompt, which patterns keep whatever the input. No pattern of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.reference.selection import first_keys


def sink_columns(key: Tensor, mask: AttentionMask, batch: int, sizes: Sequence[int]) -> Tensor:
    """The first `sizes[h]` real keys of each batch row: bool [B, h, Nk]; key [B, Hk, Nk, D]."""
    keys = torch.arange(key.shape[2], device=key.device)
    after_start = keys - first_keys(mask, batch, key.device)[:, None, None]
    # Sizes as scalars of the comparisons: a tensor of them would be a copy that a GPU waits for.
    tables = {size: (after_start >= 0) & (after_start < size) for size in set(sizes)}
    return torch.cat([tables[size] for size in sizes], 1)


def list_sinks(
    index: SparseIndex, heads: slice, key: Tensor, mask: AttentionMask, size: int
) -> None:
    """Make the first `size` real keys of each batch row the columns of some heads of an index.

    heads: of the index, which has none of their columns yet; key [B, Hk, Nk, D].
    """
    start = first_keys(mask, key.shape[0], key.device)[:, None]
    offsets = torch.arange(index.column_index.shape[-1], dtype=torch.int32, device=key.device)
    count = (key.shape[2] - start).clamp(max=size)
    index.column_count[:, heads] = count
    index.column_index[:, heads] = torch.where(offsets < count, start + offsets, 0)[:, None]
