"""Which keys of a prompt a cache may be cut to: those that its last queries attend to.

SnapKV (arXiv 2404.14469), with the means over the query heads of a kv head that kvpress takes.
Letters: B batch, H query heads, Hk kv heads, G query heads of a kv head, Nq queries, Nk keys, D
head_dim, W observing queries.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.query_rows import last_rows, real_rows, row_attention
from mpass.lowering.reference.selection import table_to_list

Pool = Literal["avg", "max"]
"""How the attention of neighbouring keys is joined."""


def select_keys(
    inputs: EstimateInputs,
    *,
    budget: int,
    window: int,
    kernel: int,
    pool: Pool,
    by_length: bool = False,
) -> Tensor:
    """Positions of the keys that each kv head keeps: int32 [B, Hk, budget], ascending, then -1.

    inputs: of causal attention without a window, all query heads. The last `window` real queries of
    a batch row look; the keys at their own positions are kept. Of the others those are that get
    most of their attention: summed over the queries, each weighed by the number of keys that it
    sees if `by_length`, pooled over `kernel` neighbours (an odd
    number), averaged over the query heads. Padding is never kept: where a row has fewer real keys
    than the budget, the rest is -1.
    """
    query, key, mask = inputs.query, inputs.key, inputs.mask
    batch, num_keys, device = inputs.batch, inputs.num_keys, query.device
    bounds = real_rows(mask, batch, inputs.num_queries, device)
    rows = last_rows(bounds, window)
    rows = rows.masked_fill(rows < bounds[:, :1], -1)
    positions = torch.arange(num_keys, device=device)
    last = bounds[:, 1:] + mask.query_offset
    kept = (positions > last - window) & (positions <= last)
    before = positions <= last - window
    if mask.key_mask is not None:
        kept, before = kept & mask.key_mask, before & mask.key_mask
    scores = []
    for head in range(key.shape[1]):
        sums = []
        for member in range(head * inputs.group, (head + 1) * inputs.group):
            weights, seen = row_attention(
                query[:, member], key[:, head], mask, rows, scale=inputs.scale
            )
            if by_length:
                weights = weights * seen.sum(-1, keepdim=True)
            sums.append(weights.sum(1))
        scores.append(pooled(torch.stack(sums, 1) * before[:, None], kernel, pool).mean(1))
    ranked = torch.stack(scores, 1).masked_fill(~before[:, None], -torch.inf)
    ranked = ranked.masked_fill(kept[:, None], torch.inf)
    order = ranked.sort(dim=-1, descending=True, stable=True).indices[..., :budget]
    table = torch.zeros_like(ranked, dtype=torch.bool).scatter_(-1, order, True)
    table &= (kept | before)[:, None]
    counts, entries = table_to_list(table, budget)
    live = torch.arange(budget, device=device) < counts[..., None]
    return torch.where(live, entries, -1).int()


def pooled(sums: Tensor, kernel: int, pool: Pool) -> Tensor:
    """Mean or greatest over `kernel` neighbouring keys, zeros beyond both ends: [B, G, Nk]."""
    if pool == "max":
        return F.max_pool1d(sums, kernel, stride=1, padding=kernel // 2)
    return F.avg_pool1d(sums, kernel, stride=1, padding=kernel // 2)
