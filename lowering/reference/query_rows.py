"""Exact attention of a few query rows, from which patterns learn which keys matter.

Letters: B batch, Nq queries, Nk keys, D head_dim, R rows.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import AttentionMask
from mpass.lowering.reference.attention import estimated_softmax
from mpass.lowering.reference.block_lists import last_query, query_mask
from mpass.lowering.reference.selection import first_keys


def real_rows(mask: AttentionMask, batch: int, num_queries: int, device: torch.device) -> Tensor:
    """First and last row that is not padding, per batch row: int64 [B, 2]; (0, -1) if none is."""
    last = last_query(mask, batch, num_queries, device) - mask.query_offset
    if query_mask(mask, num_queries) is None:
        return torch.stack([torch.zeros_like(last), last], -1)
    first = (first_keys(mask, batch, device) - mask.query_offset).clamp(min=0)
    empty = last < 0
    return torch.stack([first.masked_fill(empty, 0), last.masked_fill(empty, -1)], -1)


def evenly_spaced_rows(bounds: Tensor, count: int) -> Tensor:
    """`count` evenly spaced rows of first .. last, the last one included: int64 [B, R].

    bounds: [B, 2] of `real_rows`. Where there are fewer rows some stand twice or before the first.
    """
    first, last = bounds[:, :1], bounds[:, 1:]
    steps = torch.arange(1, count + 1, device=bounds.device)
    return first + steps * (last - first + 1) // count - 1


def last_rows(bounds: Tensor, count: int) -> Tensor:
    """The last `count` rows, ascending: int64 [B, R]; before the first where there are fewer."""
    return bounds[:, 1:] - torch.arange(count - 1, -1, -1, device=bounds.device)


def row_attention(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    rows: Tensor,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Softmax weights of some query rows over all keys, and what they see: [B, R, Nk] each.

    query [B, Nq, D], key [B, Nk, D]; rows: int64 [B, R]; bias: by distance, [L], or None. Rows that
    are negative, padding or see nothing weigh 0 everywhere.
    """
    num_queries, dim = query.shape[1:]
    num_keys = key.shape[1]
    picked = query.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, dim)).float()
    positions = rows + mask.query_offset
    distance = positions[..., None] - torch.arange(num_keys, device=key.device)
    visible = (rows >= 0)[..., None] & torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        visible &= distance >= 0
    if mask.window > 0:
        visible &= distance < mask.window
    if mask.key_mask is not None:
        visible &= mask.key_mask[:, None, :]
    real = query_mask(mask, num_queries)
    if real is not None:
        visible &= real.gather(1, rows.clamp(min=0))[..., None]
    scores = picked @ key.float().transpose(1, 2) * scale
    if bias is not None:
        scores += bias_rows(bias, rows.clamp(min=0), num_queries, 0, num_keys)
    return estimated_softmax(scores, visible), visible
