"""Selecting by score: the pieces that the estimators in plain torch share.

Letters: B batch, h heads asked for, R rows, N entries of a row, Nk keys, J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask

LAST_QUERIES = 64
"""Queries at the prompt's end from which vertical-slash estimates (MInference, section 3.2)."""


def largest(scores: Tensor, counts: Sequence[int]) -> Tensor:
    """Bool table of the `counts[r]` largest entries of each row: [B, R, N] -> [B, R, N].

    Ties go to the smaller index.
    """
    order = torch.sort(scores, dim=-1, descending=True, stable=True).indices
    limit = torch.tensor(list(counts), device=scores.device)[:, None]
    keep = torch.arange(scores.shape[-1], device=scores.device) < limit
    return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, order, keep.expand_as(order))


def running_sums(values: Tensor) -> Tensor:
    """Inclusive sums along the last dimension, the same bits at each run: [..., N] -> [..., N].

    Where there is one row alone CUDA's cumsum combines partial sums in the order in which they
    come; two rows are summed a row at a time, so one row is taken twice.
    """
    if values.numel() != values.shape[-1]:
        return values.cumsum(-1)
    return values.reshape(1, -1).expand(2, -1).cumsum(-1)[:1].view_as(values)


def table_to_list(table: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Counts [...] and ascending positions [..., width] of the true entries of a bool [..., N]."""
    counts = table.sum(-1)
    order = torch.sort(table.to(torch.uint8), dim=-1, descending=True, stable=True).indices
    order = torch.nn.functional.pad(order, (0, max(0, width - order.shape[-1])))[..., :width]
    live = torch.arange(width, device=table.device) < counts[..., None]
    return counts, torch.where(live, order, 0)


def last_rows(mask: AttentionMask, batch: int, num_queries: int, device: torch.device) -> Tensor:
    """Rows of the last queries that are not padding, ascending: int64 [B, LAST_QUERIES].

    Negative where a batch row has fewer.
    """
    last = last_row(mask, batch, num_queries, device)
    return last[:, None] - torch.arange(LAST_QUERIES - 1, -1, -1, device=device)


def last_row(mask: AttentionMask, batch: int, num_queries: int, device: torch.device) -> Tensor:
    """Row of the last query that is not padding, -1 if all are: int64 [B]."""
    offset = mask.query_offset
    if mask.key_mask is None or mask.key_mask.shape[1] < offset + num_queries:
        return torch.full((batch,), num_queries - 1, device=device)
    valid = mask.key_mask[:, offset : offset + num_queries]
    return torch.where(valid, torch.arange(num_queries, device=device), -1).amax(-1)


def first_keys(mask: AttentionMask, batch: int, device: torch.device) -> Tensor:
    """Position of the first key that is not padding, per batch row: int64 [B]."""
    if mask.key_mask is None:
        return torch.zeros(batch, dtype=torch.int64, device=device)
    return mask.key_mask.to(torch.uint8).argmax(-1)
