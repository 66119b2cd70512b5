"""How much of the exact attention an index keeps, and where the rest was.

The exact attention is computed a block of queries at a time, all keys of that block at once, so
memory is O(N). Letters: B batch, H query heads, Nq queries, Nk keys, I query blocks looked at,
J key blocks, R rows and columns of a map.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    SparseIndex,
    first_query_block,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.recorder import Operands
from mpass.lowering.reference import attention as reference

LEVELS = 15
"""Maps hold 0 to LEVELS."""

DECADES = 4.0
"""Orders of magnitude of attention mass that an exact map tells apart; its level 0 is below."""


@dataclass(frozen=True, eq=False)
class Recall:
    """What an index keeps of the exact attention of one layer.

    recall: fp64 [H], mean over queries of the attention mass on computed keys;
    lost_by_distance, lost_by_block: fp64 [H, J], mass lost per query, by block distance and by key
    block; worst: per head the query block, the key block and the share of that query block's mass
    that was lost between them; query_blocks: the blocks (absolute grid) that were looked at, and
    `all_queries` whether that is all of them; computed, exact: uint8 [H, R, R] maps, query blocks
    by key blocks: the share of keys that are computed, and the exact attention (log scale);
    output_error: fp64 [H], how far outputs are from the exact ones, as a share of their norm (root
    of summed squares over the queries looked at), None where values are not known.
    """

    recall: Tensor
    lost_by_distance: Tensor
    lost_by_block: Tensor
    worst: list[tuple[int, int, float]]
    query_blocks: list[int]
    all_queries: bool
    computed: Tensor
    exact: Tensor
    output_error: Tensor | None = None


@torch.no_grad()
def measure_recall(
    operands: Operands, *, max_query_blocks: int = 64, resolution: int = 128
) -> Recall:
    """Compare what was computed with the exact attention; batch rows are averaged.

    max_query_blocks: evenly spread query blocks are looked at when there are more; resolution: R at
    most. Scores are fp32, sums over blocks of queries fp64. Padding queries and queries that see
    nothing do not count.
    """
    query, key, mask, index = operands.query, operands.key, operands.mask, operands.index
    batch, heads, num_queries, _ = query.shape
    num_keys, first = key.shape[2], first_query_block(mask.query_offset)
    rows = num_query_blocks(num_queries, mask.query_offset)
    local = evenly_spaced(rows, max_query_blocks)
    blocks = num_key_blocks(num_keys)
    size = min(resolution, max(rows, blocks) if len(local) == rows else len(local))
    keys = reference.repeat_kv(key, heads).float()
    values = operands.value
    if values is not None:
        values = reference.repeat_kv(values, heads).float()
    columns = reference.selected_columns(index, batch, num_keys)

    device = query.device
    kept = torch.zeros(heads, dtype=torch.float64, device=device)
    count = torch.zeros((), dtype=torch.float64, device=device)
    by_distance = torch.zeros(heads, max(rows + first, blocks), dtype=torch.float64, device=device)
    by_block = torch.zeros(heads, blocks, dtype=torch.float64, device=device)
    worst_mass = torch.full((heads,), -1.0, dtype=torch.float64, device=device)
    worst_at = torch.zeros(heads, 2, dtype=torch.int64, device=device)
    computed, exact = (torch.zeros(heads, size, size, device=device) for _ in range(2))
    filled = torch.zeros(size, device=device)
    squares = torch.zeros(2, heads, dtype=torch.float64, device=device)

    for row in local:
        block = row + first
        chosen = selected_keys(index, mask, columns, row, block)
        mass, recall, valid, off = block_mass(operands, keys, values, chosen, block)
        squares += off
        kept += recall.sum((0, 2))
        count += valid.sum()
        queries = valid.sum().clamp(min=1)
        lost = to_blocks((mass * ~chosen[..., : mass.shape[-1]]).sum(0), blocks)
        by_block += lost
        distance = (block - torch.arange(blocks, device=device)).abs()
        by_distance.index_add_(1, distance, lost)
        peak, at = (lost / queries).max(-1)
        better = peak > worst_mass
        worst_mass = torch.where(better, peak, worst_mass)
        place = torch.stack([torch.full_like(at, block), at], -1)
        worst_at = torch.where(better[:, None], place, worst_at)
        y = row * size // rows
        exact[:, y] += to_bins(to_blocks(mass.sum(0), blocks) / queries, size).float()
        seen = chosen.clone()
        if mask.causal:
            seen[..., min(num_keys, (block + 1) * BLOCK) :] = False
        computed[:, y] += to_bins(to_blocks(seen.double().mean(0), blocks), size).float() / (
            to_bins(to_blocks(torch.ones(1, num_keys, device=device), blocks), size).float()
        )
        filled[y] += 1

    total = count.clamp(min=1)
    looked = filled.clamp(min=1)[:, None]
    return Recall(
        recall=(kept / total).cpu(),
        lost_by_distance=(by_distance / total).cpu(),
        lost_by_block=(by_block / total).cpu(),
        worst=[
            (int(q), int(k), float(m))
            for (q, k), m in zip(worst_at.tolist(), worst_mass.tolist(), strict=True)
        ],
        query_blocks=[row + first for row in local],
        all_queries=len(local) == rows,
        computed=linear_levels(fill_gaps(computed / looked, filled)).cpu(),
        exact=log_levels(fill_gaps(exact / looked, filled)).cpu(),
        output_error=None if values is None else relative_error(squares).cpu(),
    )


def relative_error(squares: Tensor) -> Tensor:
    """[2, H] summed squares of differences and of exact outputs -> fp64 [H]."""
    return (squares[0] / squares[1].clamp(min=torch.finfo(torch.float64).tiny)).sqrt()


def evenly_spaced(total: int, most: int) -> list[int]:
    """All of 0..total-1, or `most` of them evenly spread, the last included."""
    if total <= most:
        return list(range(total))
    return sorted({(i + 1) * total // most - 1 for i in range(most)})


def selected_keys(
    index: SparseIndex, mask: AttentionMask, columns: Tensor, row: int, block: int
) -> Tensor:
    """Keys that one query block selects before the mask cuts them: bool [B, H, Nk].

    columns: the index's vertical columns [B, H, Nk].
    row: of the lists; block: on the absolute grid.
    """
    num_keys = columns.shape[-1]
    rows, blocks = (torch.tensor([value], device=columns.device) for value in (row, block))
    selected = reference.selected_blocks(
        index, rows, blocks, num_key_blocks(num_keys), stop=block + 1
    )[:, :, 0]
    keys = torch.arange(num_keys, device=columns.device)
    before = keys < block * BLOCK if mask.causal else torch.ones_like(keys, dtype=torch.bool)
    return selected[..., keys // BLOCK] | (columns & before)


def block_mass(
    operands: Operands, keys: Tensor, values: Tensor | None, chosen: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Exact attention of one query block.

    keys: fp32 [B, H, Nk, D]; values: fp32 [B, H, Nk, Dv]; chosen: bool [B, H, Nk]. Returns the
    mass per key summed over the queries, fp64 [B, H, Nv] for the Nv keys that can be seen; the
    share of each query's mass on chosen keys, fp64 [B, H, rows], 0 where the query does not count;
    whether it counts, bool [B, 1, rows]; and the squares of `output_squares`, zeros without values.
    """
    query, mask = operands.query, operands.mask
    start = max(0, block * BLOCK - mask.query_offset)
    stop = min(query.shape[2], (block + 1) * BLOCK - mask.query_offset)
    positions = torch.arange(start, stop, device=query.device) + mask.query_offset
    seen = keys.shape[2]
    if mask.causal:
        seen = min(seen, mask.query_offset + stop)
    scores = (query[:, :, start:stop].float() * operands.scale) @ keys[:, :, :seen].mT
    if operands.softcap > 0:
        scores = operands.softcap * torch.tanh(scores / operands.softcap)
    allowed = reference.allowed_cells(mask, positions, keys.shape[2])[..., :seen]
    allowed = allowed.expand(query.shape[0], -1, -1, -1)
    valid = allowed.any(-1)
    if mask.key_mask is not None and mask.key_mask.shape[1] >= mask.query_offset + query.shape[2]:
        valid = valid & mask.key_mask[:, None, positions]
    # Sinks take probability without being keys: shares are of what falls on keys, so the softmax
    # over keys alone is the right one for them; its mass per key is scaled down by the sink below.
    scores.masked_fill_(~allowed, -torch.inf)
    peak = scores.amax(-1, keepdim=True).nan_to_num(neginf=0.0)
    weights = scores.sub_(peak).exp_()
    sums = weights @ torch.stack([torch.ones_like(chosen), chosen], -1)[:, :, :seen].float()
    total, inside = sums.double().unbind(-1)
    share = torch.where(valid, inside / total.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    if operands.sinks is not None:
        sink = torch.exp(operands.sinks.double()[:, None] - peak[..., 0].double())
        total, inside = total + sink, inside + sink
    factor = torch.where(valid, 1 / total.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
    mass = (factor.float()[:, :, None] @ weights)[:, :, 0]
    if values is None:
        off = torch.zeros(2, query.shape[1], dtype=torch.float64, device=query.device)
    else:
        inside = torch.where(valid, 1 / inside.clamp(min=torch.finfo(torch.float32).tiny), 0.0)
        off = output_squares(weights, values[:, :, :seen], chosen[..., :seen], factor, inside)
    return mass.double(), share, valid, off


def output_squares(
    weights: Tensor, values: Tensor, chosen: Tensor, of_all: Tensor, of_chosen: Tensor
) -> Tensor:
    """Squares of (output over chosen keys - exact output), and of the exact output: fp64 [2, H].

    weights: fp32 [B, H, rows, Nv], not normalised, which is overwritten; values: fp32
    [B, H, Nv, Dv]; of_all, of_chosen: fp64 [B, H, rows], what makes probabilities of weights.
    """
    exact = (weights @ values).double() * of_all[..., None]
    found = (weights.masked_fill_(~chosen[:, :, None], 0.0) @ values).double()
    difference = found * of_chosen[..., None] - exact
    return torch.stack([part.square().sum((0, 2, 3)) for part in (difference, exact)])


def to_blocks(per_key: Tensor, blocks: int) -> Tensor:
    """Sums over key blocks: [H, Nv] -> fp64 [H, J]."""
    padded = F.pad(per_key.double(), (0, blocks * BLOCK - per_key.shape[-1]))
    return padded.unflatten(-1, (blocks, BLOCK)).sum(-1)


def to_bins(per_block: Tensor, size: int) -> Tensor:
    """Sums over a map's columns: [H, J] -> [H, R]; block j lies in column j * R // J."""
    blocks = per_block.shape[-1]
    columns = torch.arange(blocks, device=per_block.device) * size // blocks
    bins = torch.zeros(per_block.shape[0], size, dtype=per_block.dtype, device=per_block.device)
    return bins.index_add_(1, columns, per_block)


def fill_gaps(table: Tensor, filled: Tensor) -> Tensor:
    """Copy to map rows that no query block fell into the nearest row above (or the first)."""
    rows = torch.arange(len(filled), device=filled.device)
    source = torch.where(filled > 0, rows, -1).cummax(0).values
    return table[:, source.clamp(min=int(torch.argmax((filled > 0).int())))]


def linear_levels(share: Tensor) -> Tensor:
    """0..1 -> 0..LEVELS; what is not zero does not become zero."""
    levels = (share * LEVELS).round().clamp(0, LEVELS)
    return torch.where((share > 0) & (levels == 0), 1, levels).to(torch.uint8)


def log_levels(mass: Tensor) -> Tensor:
    """Attention mass -> 0..LEVELS on a log scale over DECADES; 1.0 is LEVELS."""
    scaled = 1 + torch.log10(mass.clamp(min=1e-12)) / DECADES
    return (scaled * LEVELS).round().clamp(0, LEVELS).to(torch.uint8)
