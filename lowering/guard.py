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
from mpass.lowering.exact_rows import rows_to_look_at
from mpass.lowering.index import ALL_BLOCKS, ALL_DIAGONALS, SparseIndex
from mpass.lowering.inputs import AttentionInputs, RowLosses

ROWS = 16
"""Most query rows that are looked at: a head that is wrong is wrong in most of them."""


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

    What counts is the mean over the rows of a batch row that are no padding. measured: how many
    rows somebody measures in any case, with their outputs; 0 for none.
    """
    if most_lost >= 1.0:
        return Guarded(index)
    count = measured or rows_to_look_at(inputs.query.shape[2], ROWS)
    found = choose_lowering(inputs).row_losses(inputs, index, count, measured > 0)
    counted = found.counted[:, None]
    lost = (found.lost * counted).sum(-1) / counted.sum(-1).clamp(min=1)
    wrong = lost > most_lost
    why = ""
    if device_lowering(inputs.query.device).decides_by_cost:
        if not bool(wrong.any()):
            return Guarded(index, losses=found)
        why = f"{float(lost.max()):.0%} of a head's attention would be lost, {most_lost:.0%} may be"
    wrong = over_slots(wrong, index.head_slots)
    left = replace(found, lost=found.lost * ~wrong[..., None])
    return Guarded(with_whole_heads(index, wrong), why, left)


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
