"""Scores of key blocks from pooled keys: each sampled query row weighs the means of runs of keys.

Keys are averaged over runs of `pool` positions; a run counts as that many keys that all equal
their mean. Looking at single query rows, not at their mean, keeps what is sharp in a few of them.
Blocks of queries and of keys are `block_size` positions of the absolute grid. Letters: B batch, Nq
queries, Nk keys, D head_dim, C query blocks of a chunk, J key blocks, R rows sampled per query
block, S runs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, AttentionMask
from mpass.lowering.reference.attention import estimated_softmax
from mpass.lowering.reference.block_lists import query_mask


def pooled_keys(
    key: Tensor, mask: AttentionMask, pool: int, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Mean of each run of `pool` keys, fp32 [B, S, D], and how many real keys it has, fp32 [B, S].

    key: [B, Nk, D]. Whole blocks are covered: runs beyond the last key have no keys.
    """
    batch, num_keys, dim = key.shape
    runs = (num_keys + block_size - 1) // block_size * (block_size // pool)
    real = torch.ones(batch, num_keys, device=key.device)
    if mask.key_mask is not None:
        real = mask.key_mask.float()
    tail = runs * pool - num_keys
    weighted = torch.nn.functional.pad(key.float() * real[..., None], (0, 0, 0, tail))
    count = torch.nn.functional.pad(real, (0, tail)).view(batch, runs, pool).sum(-1)
    mean = weighted.view(batch, runs, pool, dim).sum(2) / count.clamp(min=1)[..., None]
    return mean, count


def row_scores(
    query: Tensor,
    means: Tensor,
    counts: Tensor,
    mask: AttentionMask,
    blocks: Tensor,
    *,
    scale: float,
    rows: int,
    pool: int,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention that key blocks get from sampled rows of query blocks: sum and greatest, [B, C, J].

    query [B, Nq, D]; means [B, S, D] and counts [B, S] of `pooled_keys`; blocks: query blocks [C];
    rows: how many of each are looked at, see `sampled_rows`; bias: `run_line` of a bias by distance
    and the runs, [L], or None. Per row the softmax over all runs that
    it sees, summed over the runs of a block. A run is seen by a row that sees its
    first key (causal) and its last (window). Padding rows do not count. The second result is the
    largest share that one row gives to the block; both are fp32.
    """
    local, counted = sampled_rows(mask, blocks, query.shape[1], rows)
    start = torch.arange(means.shape[1], device=query.device) * pool
    distance = (local + mask.query_offset)[..., None] - start
    visible = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        visible &= distance >= 0
    if mask.window > 0:
        visible &= distance - (pool - 1) < mask.window
    logits = run_logits(query, means, local, scale, pool, bias) + counts.log()[:, None, None, :]
    weights = estimated_softmax(logits, visible & (counts > 0)[:, None, None, :])
    weights = (weights * counted[..., None]).unflatten(-1, (-1, BLOCK // pool)).sum(-1)
    return weights.sum(2), weights.amax(2)


def tile_scores(
    query: Tensor,
    means: Tensor,
    counts: Tensor,
    mask: AttentionMask,
    blocks: Tensor,
    *,
    scale: float,
    block_size: int,
    bias: Tensor | None = None,
) -> Tensor:
    """Exponentials of all rows of a query block relative to its greatest: fp32 [B, C, J], <= rows.

    Arguments as of `row_scores`, with one run per block. FlashPrefill (arXiv 2603.06199):
    `sum over rows of exp(l - max over rows and blocks of l)` with `l = q . mean(K_J) * scale`. Only
    blocks that a row sees whole take part, so the diagonal block scores next to nothing; it is kept
    anyway. Rows are not normalised one by one: rows with large logits decide for their tile.
    """
    local, counted = sampled_rows(mask, blocks, query.shape[1], block_size, block_size)
    start = torch.arange(means.shape[1], device=query.device) * block_size
    distance = (local + mask.query_offset)[..., None] - start
    whole = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        whole &= distance - (block_size - 1) >= 0
    if mask.window > 0:
        whole &= distance < mask.window
    seen = whole & (counts > 0)[:, None, None, :] & counted[..., None]
    logits = run_logits(query, means, local, scale, block_size, bias).masked_fill(~seen, -torch.inf)
    greatest = logits.amax((2, 3), keepdim=True)
    return (logits - greatest).exp().nan_to_num(0.0).sum(2)


def run_logits(
    query: Tensor, means: Tensor, rows: Tensor, scale: float, pool: int, bias: Tensor | None = None
) -> Tensor:
    """Scaled products of the query rows [C, R] with all means: fp32 [B, C, R, S].

    pool: keys of a run; bias: `run_line` of a bias by distance, [L], which is added.
    """
    logits = query[:, rows.flatten()].float() @ means.transpose(1, 2) * scale
    logits = logits.view(query.shape[0], *rows.shape, means.shape[1])
    if bias is None:
        return logits
    starts = torch.arange(means.shape[1], device=query.device) * pool
    places = starts - rows[..., None] + (query.shape[1] - 1)
    return logits + bias[places.clamp(0, bias.shape[0] - 1)]


def sampled_rows(
    mask: AttentionMask, blocks: Tensor, num_queries: int, rows: int, block_size: int = BLOCK
) -> tuple[Tensor, Tensor]:
    """Which query rows stand for each query block: rows [C, R]; which count: bool [B or 1, C, R].

    Every (block_size // rows)-th row, counted back from the block's last one; `rows` divides
    block_size. Rows that do not exist or are padding do not count.
    """
    stop = mask.query_offset + num_queries
    last = ((blocks + 1) * block_size).clamp(max=stop) - 1
    steps = torch.arange(rows - 1, -1, -1, device=blocks.device) * (block_size // rows)
    positions = last[:, None] - steps
    local = positions - mask.query_offset
    counted = ((local >= 0) & (positions >= blocks[:, None] * block_size))[None]
    local = local.clamp(min=0)
    real = query_mask(mask, num_queries)
    return local, counted if real is None else counted & real[:, local]
