"""The first keys of a prompt, which patterns keep whatever the input. No pattern of its own."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from mpass.lowering.estimate import first_keys
from mpass.lowering.index import AttentionMask
from torch import Tensor


def sink_columns(key: Tensor, mask: AttentionMask, batch: int, sizes: Sequence[int]) -> Tensor:
    """The first `sizes[h]` real keys of each batch row: bool [B, h, Nk]; key [B, Hk, Nk, D]."""
    keys = torch.arange(key.shape[2], device=key.device)
    after_start = keys - first_keys(mask, batch, key.device)[:, None, None]
    limit = torch.tensor(list(sizes), device=key.device)[:, None]
    return (after_start >= 0) & (after_start < limit)
