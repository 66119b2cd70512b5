"""Heads that lose more than a call may run whole: some rows are held against exact attention.

An estimate may be wrong of a whole head, as where each query looks for one key of its own whose
neighbours hide it. So where a loss is promised (`options={"max_loss": ...}`), the softmax mass that
an index leaves out is taken from some query rows exactly, before anything is computed with it. A
head that would lose too much of it then gets an index of every key. On CPUs the host reads what was
found. On GPUs, whose host must not wait, the device alone acts on it. Letters: B batch, H query
heads, Nq queries, R rows looked at.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpass.lowering.dispatch import choose_lowering, device_lowering
from mpass.lowering.distance_bias import bias_of_queries
from mpass.lowering.exact_rows import rows_to_look_at
from mpass.lowering.index import ALL_BLOCKS, ALL_DIAGONALS, SparseIndex, first_query_block
from mpass.lowering.inputs import AttentionInputs, RowLosses

ROWS = 16
"""Most query rows that are looked at: a head that is wrong is wrong in most of them."""

OVER_ALL = 0.35
"""Of what a head may lose, what the heads of a call may lose on average: else those above it keep
every key as well. A single head in a few may lose much, as some of the first layer do on texts; all
may not."""


@dataclass(frozen=True, slots=True, eq=False)
class Guarded:
    """An index whose heads lose no more than they may, as far as some rows tell.

    why: what was found, in words; "" where nothing was changed, or where the host does not know.
    losses: what the new index loses of the rows; None where nobody looked.
    """

    index: SparseIndex
    why: str = ""
    losses: RowLosses | None = None


def guarded(
    inputs: AttentionInputs, index: SparseIndex, most_lost: float, *, measured: int = 0
) -> Guarded:
    """The index, with every key for heads that would lose more than `most_lost`, a share.

    Where all heads together lose more than OVER_ALL of it, heads that lose as much keep every key,
    too. What counts is the mean over the rows of a batch row that are no padding. measured: how
    many rows somebody measures in any case, with their outputs; 0 for none.
    """
    if most_lost >= 1.0:
        return Guarded(index)
    host_reads = device_lowering(inputs.query.device).decides_by_cost
    spans = real_spans(inputs) if host_reads else None
    losses = None
    if spans is None:
        count = measured or rows_to_look_at(inputs.query.shape[2], ROWS)
        losses = choose_lowering(inputs).row_losses(inputs, index, count, measured > 0)
        lost = mean_lost(losses)
    else:
        lost = torch.cat([lost_between(inputs, index, b, *span) for b, span in enumerate(spans)])
    together = OVER_ALL * most_lost
    many = lost.mean(1, keepdim=True) > together
    wrong, why = (lost > most_lost) | (many & (lost > together)), ""
    if host_reads:
        if not bool(wrong.any()):
            return Guarded(index, losses=losses)
        found, most, of = (float(lost.max()), most_lost, "a head's")
        if found <= most_lost:
            found, most, of = (float(lost.mean(1).max()), together, "all heads'")
        why = f"{found:.0%} of {of} attention would be lost, {most:.0%} may be"
    wrong = over_slots(wrong, index.head_slots)
    left = losses and replace(losses, lost=losses.lost * ~wrong[..., None])
    return Guarded(with_whole_heads(index, wrong), why, left)


def mean_lost(losses: RowLosses) -> Tensor:
    """What each head loses of the rows that count: [B, H]."""
    counted = losses.counted[:, None]
    return (losses.lost * counted).sum(-1) / counted.sum(-1).clamp(min=1)


def real_spans(inputs: AttentionInputs) -> list[tuple[int, int]] | None:
    """The queries of each batch row from the first to the last that are no padding.

    None where all have every query, or where a key mask tells nothing of queries. A row of a batch
    that is padding for the most part would else be judged by the few rows that fall on its text.
    """
    mask, num_queries = inputs.mask, inputs.query.shape[2]
    if mask.key_mask is None or mask.query_offset + num_queries > inputs.key.shape[2]:
        return None
    real = mask.key_mask[:, mask.query_offset : mask.query_offset + num_queries].int()
    starts, stops = real.argmax(1), num_queries - real.flip(1).argmax(1)
    some = real.amax(1) > 0
    found = zip(starts.tolist(), stops.tolist(), some.tolist(), strict=True)
    spans = [(start, stop) if is_any else (0, 0) for start, stop, is_any in found]
    return None if all(span == (0, num_queries) for span in spans) else spans


def lost_between(
    inputs: AttentionInputs, index: SparseIndex, row: int, start: int, stop: int
) -> Tensor:
    """What each head loses of queries start <= n < stop of one batch row: [1, H]."""
    if stop <= start:
        return torch.zeros(1, inputs.query.shape[1])
    own, offset = slice(row, row + 1), inputs.mask.query_offset
    assert inputs.mask.key_mask is not None
    mask = replace(inputs.mask, query_offset=offset + start, key_mask=inputs.mask.key_mask[own])
    bias = inputs.distance_bias
    if bias is not None:
        bias = bias_of_queries(bias, start, stop, inputs.query.shape[2])
    part = replace(
        inputs,
        query=inputs.query[own, :, start:stop],
        key=inputs.key[own],
        value=inputs.value[own],
        mask=mask,
        distance_bias=bias,
    )
    first = first_query_block(offset)
    blocks = slice(
        first_query_block(offset + start) - first, first_query_block(offset + stop - 1) + 1 - first
    )
    kept = SparseIndex(
        index.block_count[own, :, blocks],
        index.block_index[own, :, blocks],
        index.diagonal_count[own],
        index.diagonal_index[own],
        index.column_count[own],
        index.column_index[own],
        index.head_slots,
    )
    count = rows_to_look_at(stop - start, ROWS)
    return mean_lost(choose_lowering(part).row_losses(part, kept, count, False))


def over_slots(wrong: Tensor, slots: Sequence[int]) -> Tensor:
    """Heads that are wrong, [B, H], and those that share a row of the index with one."""
    if len(set(slots)) == len(slots):
        return wrong
    of_slot = {slot: [h for h, own in enumerate(slots) if own == slot] for slot in slots}
    columns = wrong.unbind(1)
    any_of = {slot: torch.stack([columns[h] for h in own]).any(0) for slot, own in of_slot.items()}
    return torch.stack([any_of[slot] for slot in slots], 1)


def with_whole_heads(index: SparseIndex, whole: Tensor) -> SparseIndex:
    """The index, with every key for some heads.

    whole: bool [B, H], the same for heads that share a row.
    """
    heads = {slot: head for head, slot in enumerate(index.head_slots)}
    columns = whole.unbind(1)
    unused = torch.zeros_like(columns[0])
    lists = [columns[heads[n]] if n in heads else unused for n in range(index.block_count.shape[1])]
    blocks, diagonals = index.block_count, index.diagonal_count
    if lists:
        blocks = torch.where(torch.stack(lists, 1)[..., None], ALL_BLOCKS, blocks)
    rows = [
        columns[heads[-1 - n]] if -1 - n in heads else unused for n in range(diagonals.shape[1])
    ]
    if rows:
        diagonals = torch.where(torch.stack(rows, 1), ALL_DIAGONALS, diagonals)
    return replace(index, block_count=blocks, diagonal_count=diagonals)
