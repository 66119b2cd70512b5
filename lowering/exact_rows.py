"""The exact attention of some query rows, spread over a call by a fixed rule.

What an index loses is known of these rows: every key of theirs is weighed. This is what kernels of
a lowering mean by it (`Lowering.row_losses`). The rows are taken a few at a time, so that no more
than CHUNK_BYTES of weights exist. Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk
keys, D head_dim, Dv value dim, R rows of a chunk, J key blocks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.dispatch import device_lowering
from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import ALL_BLOCKS, ALL_DIAGONALS, BLOCK, SparseIndex, first_query_block
from mpass.lowering.inputs import AttentionInputs, RowLosses
from mpass.lowering.reference.attention import allowed_cells, masked_softmax

QUERIES_PER_ROW, LEAST_ROWS = 128, 4
"""One row is looked at of so many queries, but never fewer than that many: then what rows cost is a
share of what the queries cost, whatever came before them."""

CHUNK_BYTES = 1 << 26
"""Most memory of weights at a time."""

FEW_ROWS = 16
"""Rows at a time where launching an op costs little: the sooner a chunk's last row, the fewer keys
are weighed for nothing."""

HASH = 2654435761
"""Knuth's multiplicative hash (The Art of Computer Programming, volume 3, section 6.4)."""


@dataclass(frozen=True, slots=True, eq=False)
class ExactRows:
    """Some rows of an attention, exactly.

    rows: which of the queries, int64 [R]; counted: bool [B, R], False for padding and for rows
    that see nothing; weights: softmax weights, fp32 [B, H, R, J * BLOCK], 0 where a row sees no
    key; mass: their sums per key block, [B, H, R, J]; output: fp32 [B, H, R, Dv], None
    where only masses were asked for; stop: the position after the last row that may be among them.
    """

    rows: Tensor
    counted: Tensor
    weights: Tensor
    mass: Tensor
    output: Tensor | None
    stop: int


def rows_to_look_at(num_queries: int, most: int) -> int:
    """How many query rows of a call are looked at, `most` of a long one."""
    return min(num_queries, most, max(LEAST_ROWS, num_queries // QUERIES_PER_ROW))


def sampled_rows(num_queries: int, first: int, stop: int, count: int, device: object) -> Tensor:
    """Row `i` of `count` equal parts of the queries for first <= i < stop: int64 [stop - first].

    One row of each part, by a hash of the part's number: the same in every run, and in no step with
    what repeats in a text. It is computed on the device, whose host does not wait.
    """
    i = torch.arange(first, stop, device=device)  # type: ignore[call-overload]
    low, high = i * num_queries // count, (i + 1) * num_queries // count
    return low + ((i * HASH % (1 << 32)) >> 8) % (high - low)


def exact_rows(inputs: AttentionInputs, count: int, *, outputs: bool = True) -> Iterator[ExactRows]:
    """The exact attention of `count` rows (of all if there are fewer), a chunk after the other.

    outputs: whether their outputs are computed, too.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    batch, heads, num_queries, _ = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    count = min(count, num_queries)
    few = FEW_ROWS if device_lowering(query.device).decides_by_cost else count
    at_once = max(1, min(few, CHUNK_BYTES // (4 * batch * heads * max(1, num_keys))))
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys, values = key.to(wide), value.to(wide) if outputs else None
    for first in range(0, count, at_once):
        last = min(count, first + at_once)
        rows = sampled_rows(num_queries, first, last, count, query.device)
        stop = mask.query_offset + last * num_queries // count
        # Whole blocks, so that their sums need no copy.
        seen = min(num_keys, -(-stop // BLOCK) * BLOCK) if mask.causal else num_keys
        positions = rows + mask.query_offset
        allowed = allowed_cells(mask, positions, num_keys)[..., :seen]
        picked = query[:, :, rows].to(wide).unflatten(1, (kv_heads, -1)).flatten(2, 3)
        scores = (picked * inputs.scale) @ keys[:, :, :seen].mT
        scores = scores.view(batch, heads, len(rows), seen)
        if inputs.distance_bias is not None:
            scores += bias_rows(inputs.distance_bias.to(wide), rows, num_queries, 0, seen)
        if inputs.softcap > 0:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        weights = row_weights(scores, allowed, inputs)
        output = None
        if values is not None:
            grouped = weights.unflatten(1, (kv_heads, -1)).flatten(2, 3)
            output = (grouped @ values[:, :, :seen]).view(batch, heads, len(rows), -1)
        counted = allowed.any(-1)[:, 0].expand(batch, -1)
        real = real_rows(inputs, rows)
        counted = counted if real is None else counted & real
        if seen % BLOCK:
            weights = torch.nn.functional.pad(weights, (0, -seen % BLOCK))
        yield ExactRows(
            rows,
            counted,
            weights,
            weights.unflatten(-1, (-1, BLOCK)).sum(-1),
            output,
            stop,
        )


def real_rows(inputs: AttentionInputs, rows: Tensor) -> Tensor | None:
    """Which rows are no padding, bool [B, R], where that can be told of queries; None for all."""
    mask = inputs.mask
    beyond = mask.query_offset + inputs.query.shape[2] > inputs.key.shape[2]
    return None if mask.key_mask is None or beyond else mask.key_mask[:, rows + mask.query_offset]


def row_losses(inputs: AttentionInputs, index: SparseIndex, count: int, outputs: bool) -> RowLosses:
    """What an index loses of `count` rows, by a fixed rule spread over the queries.

    outputs: whether what dense attention gives for these rows is computed, too.
    """
    rows, counted, lost, exact = [], [], [], []
    for part in exact_rows(inputs, count, outputs=outputs):
        rows.append(part.rows)
        counted.append(part.counted)
        left_out = (part.mass.sum(-1) - kept_mass(part, inputs, index)).clamp(min=0.0)
        lost.append(left_out * part.counted[:, None])
        exact += [] if part.output is None else [part.output]
    found = torch.cat(exact, 2) if exact else None
    return RowLosses(torch.cat(rows), torch.cat(counted, 1), torch.cat(lost, 2), found)


def row_weights(scores: Tensor, allowed: Tensor, inputs: AttentionInputs) -> Tensor:
    """Softmax weights of scores [B, H, R, Nv], which are overwritten.

    Where causality alone hides keys every row sees one, and the rest is one pass less.
    """
    mask = inputs.mask
    if inputs.sink_logits is not None or mask.key_mask is not None or mask.window > 0:
        return masked_softmax(scores, allowed, inputs.sink_logits)
    if mask.causal:
        scores.masked_fill_(~allowed, -torch.inf)
    return torch.softmax(scores, -1)


def kept_mass(exact: ExactRows, inputs: AttentionInputs, index: SparseIndex) -> Tensor:
    """The softmax mass of each row on keys that an index selects: [B, H, R]."""
    mask, weights = inputs.mask, exact.weights
    blocks = (exact.rows + mask.query_offset) // BLOCK
    chosen = chosen_blocks(exact, inputs, index, exact.mass.shape[-1])
    kept = (exact.mass * chosen).sum(-1)
    if index.column_index.shape[-1] == 0:
        return kept
    columns = index.column_index.long().clamp(max=weights.shape[-1] - 1)
    live = torch.arange(columns.shape[-1], device=columns.device) < index.column_count[..., None]
    live = live & (index.column_index < weights.shape[-1])
    places = columns[:, :, None].expand(-1, -1, weights.shape[2], -1)
    extra = weights.gather(-1, places) * live[:, :, None]
    extra = extra * ~chosen.gather(-1, places // BLOCK)
    if mask.causal:  # a column is seen by the query blocks after it
        extra = extra * (places < (blocks * BLOCK)[:, None])
    return kept + extra.sum(-1)


def chosen_blocks(
    exact: ExactRows, inputs: AttentionInputs, index: SparseIndex, count: int
) -> Tensor:
    """The first `count` key blocks, whether the rows' query blocks select them: [B, H, R, J].

    As mpass.lowering.reference.attention.selected_blocks, but of all heads of a form at a time: on
    a GPU what this costs is launches.
    """
    device = index.block_count.device
    blocks = (exact.rows + inputs.mask.query_offset) // BLOCK
    parts = []
    lists = [slot for slot in index.head_slots if slot >= 0]
    if lists:
        local = blocks - first_query_block(inputs.mask.query_offset)
        counts = index.block_count.index_select(2, local)
        entries = index.block_index.index_select(2, local).long()
        live = torch.arange(entries.shape[-1], device=device) < counts[..., None]
        table = torch.zeros(*counts.shape, count + 1, dtype=torch.bool, device=device)
        table.scatter_(-1, torch.where(live, entries.clamp(max=count), count), True)
        parts.append((table | (counts == ALL_BLOCKS)[..., None])[..., :count])
    if len(lists) < len(index.head_slots):
        size = max(count, (exact.stop + BLOCK - 1) // BLOCK)
        counts, entries = index.diagonal_count, index.diagonal_index.long()
        live = torch.arange(entries.shape[-1], device=device) < counts[..., None]
        # Distances -count .. size - 1, those of blocks ahead first.
        live &= (entries < size) & (entries >= -count)
        table = torch.zeros(*counts.shape, count + size + 1, dtype=torch.bool, device=device)
        table.scatter_(-1, torch.where(live, entries, size) + count, True)
        table |= (counts == ALL_DIAGONALS)[..., None]
        distance = blocks[:, None] - torch.arange(count, device=device)
        parts.append(table[:, :, distance + count])
    if len(parts) == 1 and not lists:
        rows = [-1 - slot for slot in index.head_slots]
    elif len(parts) == 1:
        rows = list(index.head_slots)
    else:
        num_lists = parts[0].shape[1]
        rows = [slot if slot >= 0 else num_lists - 1 - slot for slot in index.head_slots]
    joined = torch.cat(parts, 1)
    if rows == list(range(joined.shape[1])):
        return joined
    # Stacked, not indexed by a list: that would copy from the host.
    return torch.stack([joined.unbind(1)[row] for row in rows], 1)
