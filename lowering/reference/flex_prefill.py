"""FlexPrefill's selection: adaptive vertical-slash, or pooled blocks where those are good.

Lai et al., ICLR 2025, algorithms 1 to 3, and the released code where it differs: budgets are
counted in tokens and divided by the block size, and whole blocks and block diagonals are kept.
Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, I query blocks, J key
blocks, all of `block_size` positions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.distance_bias import pair_line
from mpass.lowering.index import AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import estimated_softmax
from mpass.lowering.reference.block_lists import (
    allowed_blocks,
    candidates,
    keep,
    list_index,
    rank_blocks,
    tiled,
)
from mpass.lowering.reference.block_sparse import pooled_means
from mpass.lowering.reference.pooled_keys import pooled_keys
from mpass.lowering.reference.query_rows import last_rows, real_rows, row_attention
from mpass.lowering.reference.selection import running_sums


@dataclass(frozen=True, slots=True)
class FlexPrefillRule:
    """What one head keeps; see mpass.patterns.flex_prefill for the meaning of each number.

    sink_blocks, local_blocks: first and nearest blocks, always kept; last_blocks: query blocks at
    the end that keep every block. The published rule fixes them.
    """

    gamma: float
    tau: float
    min_budget: int
    max_budget: int
    block_size: int
    max_blocks: int
    sink_blocks: int = 1
    local_blocks: int = 1
    last_blocks: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class FlexPrefillChoice:
    """What was decided for one head of a prompt.

    vertical, slash: kept key blocks and block distances, bool [B, J]; vertical_score,
    slash_score: their share of the last queries' attention, fp32 [B, J]; query_aware: bool [B];
    pooled: the attention of mean queries to mean keys, fp32 [B, I, J], and pooled_kept, bool.
    """

    vertical: Tensor
    slash: Tensor
    vertical_score: Tensor
    slash_score: Tensor
    query_aware: Tensor
    pooled: Tensor
    pooled_kept: Tensor


def flex_prefill_index(inputs: EstimateInputs, rules: Sequence[FlexPrefillRule]) -> SparseIndex:
    """The index of `mpass.patterns.flex_prefill` for the given heads, with one rule per head.

    The scores of pooled queries are ranked over the whole
    prompt at once, as the rule wants it: (N / block_size)^2 numbers per head, one head at a time.
    """
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    chosen: dict[int, FlexPrefillChoice] = {}
    lines = inputs.bias_lines()

    def kept_tiles(i: int, tiles: Tensor) -> Tensor:
        if i not in chosen:
            chosen.clear()
            chosen[i] = choose(
                query[:, heads[i]],
                key[:, heads[i] // inputs.group],
                mask,
                rules[i],
                scale=inputs.scale,
                bias=lines[i],
            )
        choice, rule = chosen[i], rules[i]
        num_blocks = choice.vertical.shape[1]
        distance = tiles[:, None] - torch.arange(num_blocks, device=tiles.device)
        on_slash = choice.slash[:, distance.clamp(min=0)]
        wanted = choice.vertical[:, None, :] | on_slash
        scores = choice.vertical_score[:, None, :] + choice.slash_score[:, distance.clamp(min=0)]
        first = mask.query_offset // rule.block_size
        aware = choice.query_aware[:, None, None]
        wanted = wanted | (aware & choice.pooled_kept[:, tiles - first])
        scores = torch.where(aware, choice.pooled[:, tiles - first], scores)
        options = candidates(
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
        order, _ = rank_blocks(options, first=wanted)
        return keep(options, order, wanted.gather(-1, order))

    def kept_blocks(i: int, blocks: Tensor) -> Tensor:
        return tiled(kept_tiles, rules[i].block_size, mask, key.shape[2])(i, blocks)

    return list_index(query, mask, len(heads), flex_prefill_width(rules), kept_blocks)


def flex_prefill_width(rules: Sequence[FlexPrefillRule]) -> IndexWidth:
    """Buffer sizes of `flex_prefill_index`, from the limits alone."""
    return IndexWidth(max_blocks=max(rule.max_blocks for rule in rules))


def choose(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    rule: FlexPrefillRule,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> FlexPrefillChoice:
    """Kind and budgets of one head: query [B, Nq, D], key [B, Nk, D].

    bias: by distance, [L], or None. Of pooled queries it counts as `pair_line` has it.
    """
    size, num_keys = rule.block_size, key.shape[1]
    rows = last_rows(real_rows(mask, query.shape[0], query.shape[1], query.device), size)
    weights, _ = row_attention(query, key, mask, rows, scale=scale, bias=bias)
    live = (weights.sum(-1) > 0).sum(-1, keepdim=True).clamp(min=1)
    vertical = weights.sum(1) / live
    slash = distance_sums(weights, rows + mask.query_offset) / live

    blocks = (num_keys + size - 1) // size
    fewest = min((rule.min_budget + size - 1) // size, blocks)
    most = min((rule.max_budget + size - 1) // size, blocks)
    vertical_blocks = top_share_blocks(vertical, rule.gamma, size).clamp(fewest, most)
    slash_blocks = top_share_blocks(slash, rule.gamma, size).clamp(fewest, most)
    vertical, slash = block_sums(vertical, size), block_sums(slash, size)

    means, counts = pooled_keys(key, mask, size, size)
    mean_query = last_mean(query, rows, weights)
    products = (mean_query[:, None] @ means.mT)[:, 0] * scale
    line = None
    if bias is not None:
        line = pair_line(bias, mask.query_offset + query.shape[1] - 1, size, means.shape[1])
        products = products + last_block_bias(line, mask, rows, size)
    proxy = estimated_softmax(products, counts > 0)
    query_aware = root_divergence(proxy, vertical) < rule.tau
    vertical_blocks = vertical_blocks.masked_fill(query_aware, fewest)
    slash_blocks = slash_blocks.masked_fill(query_aware, fewest)

    pooled, kept = pooled_attention(query, means, counts, mask, rule, scale=scale, bias=line)
    return FlexPrefillChoice(
        vertical=largest_each(with_first(vertical), vertical_blocks),
        slash=largest_each(with_first(slash), slash_blocks),
        vertical_score=vertical,
        slash_score=slash,
        query_aware=query_aware,
        pooled=pooled,
        pooled_kept=kept,
    )


def pooled_attention(
    query: Tensor,
    means: Tensor,
    counts: Tensor,
    mask: AttentionMask,
    rule: FlexPrefillRule,
    *,
    scale: float,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of mean queries to mean keys, fp32 [B, I, J], and which cells are kept, bool.

    Cells are ranked over all query blocks together; they are kept while their running sum is at
    most gamma times the number of query blocks; a gamma of 1 keeps every one that weighs anything.
    bias: `pair_line` of a bias by distance, or None.
    """
    size = rule.block_size
    pooled = pooled_means(query, size, mask, offset=mask.query_offset)
    first = mask.query_offset // size
    tiles = torch.arange(first, first + pooled.shape[1], device=query.device)
    allowed = allowed_blocks(mask, tiles, means.shape[1] * size, size)
    products = pooled @ means.mT * scale
    if bias is not None:
        most = means.shape[1] - 1
        distance = tiles[:, None] - torch.arange(most + 1, device=query.device)
        products += bias[(most - distance).clamp(0, 2 * most)]
    weights = estimated_softmax(products, allowed & (counts > 0)[:, None, :])
    flat = weights.flatten(1)
    ordered = flat.sort(dim=-1, descending=True, stable=True)
    kept = running_sums(ordered.values) <= rule.gamma * pooled.shape[1]
    kept = (kept if rule.gamma < 1 else torch.ones_like(kept)) & (ordered.values > 0)
    table = torch.zeros_like(kept).scatter_(-1, ordered.indices, kept)
    return weights, table.view_as(weights)


def last_block_bias(line: Tensor, mask: AttentionMask, rows: Tensor, size: int) -> Tensor:
    """What is added to the products of the last rows' mean query with mean keys: [B, J].

    line: of `pair_line`; rows: [B, R], whose last one says in which block they end.
    """
    most = line.shape[0] // 2
    block = (rows[:, -1:].clamp(min=0) + mask.query_offset) // size
    return line[(most - block + torch.arange(most + 1, device=line.device)).clamp(0, 2 * most)]


def distance_sums(weights: Tensor, positions: Tensor) -> Tensor:
    """Weights [B, R, Nk] of rows at `positions` [B, R], summed per distance to the key: [B, Nk]."""
    # Gathered per distance, not scattered per key: atomics would add in another order each time.
    num_keys = weights.shape[-1]
    keys = positions[..., None] - torch.arange(num_keys, device=weights.device)
    there = (keys >= 0) & (keys < num_keys)
    return weights.gather(2, keys.clamp(0, num_keys - 1)).where(there, 0.0).sum(1)


def top_share_blocks(shares: Tensor, gamma: float, size: int) -> Tensor:
    """Blocks whose tokens hold `gamma` of the shares [B, N]: int64 [B], by the released code.

    The number of tokens divided by the block size, plus one: scattered tokens are under-covered.
    A gamma of 1 takes all tokens.
    """
    if gamma >= 1:
        return torch.full(shares.shape[:1], (shares.shape[1] + 1) // size + 1, device=shares.device)
    running = running_sums(shares.sort(dim=-1, descending=True).values)
    return ((running <= gamma).sum(-1) + 1) // size + 1


def block_sums(shares: Tensor, size: int) -> Tensor:
    """[B, N] -> [B, J], summed over blocks of `size`."""
    tail = -shares.shape[-1] % size
    return torch.nn.functional.pad(shares, (0, tail)).unflatten(-1, (-1, size)).sum(-1)


def last_mean(query: Tensor, rows: Tensor, weights: Tensor) -> Tensor:
    """Mean of the rows [B, R] of a query [B, Nq, D] that weigh anything: fp32 [B, D]."""
    live = (weights.sum(-1) > 0)[..., None]
    picked = query.gather(1, rows.clamp(min=0)[..., None].expand(-1, -1, query.shape[-1])).float()
    return picked.where(live, 0.0).sum(1) / live.sum(1).clamp(min=1)


def root_divergence(left: Tensor, right: Tensor) -> Tensor:
    """Square root of the Jensen-Shannon divergence of two distributions: [B, N] -> [B]."""
    middle = (left + right) / 2

    def half(part: Tensor) -> Tensor:
        return 0.5 * torch.where(part > 0, part * (part / middle).log(), 0.0).sum(-1)

    return (half(left) + half(right)).clamp(min=0).sqrt()


def with_first(scores: Tensor) -> Tensor:
    """Scores [B, N] with the first entry above all others."""
    raised = scores.clone()
    raised[:, 0].fill_(torch.inf)
    return raised


def largest_each(scores: Tensor, counts: Tensor) -> Tensor:
    """Bool table of the counts[b] largest entries of each batch row [B, N]; ties to the first."""
    order = scores.sort(dim=-1, descending=True, stable=True).indices
    keep = torch.arange(scores.shape[-1], device=scores.device) < counts[:, None]
    return torch.zeros_like(keep).scatter_(-1, order, keep)
