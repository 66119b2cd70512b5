"""Reading a mask tensor: is it causal, with a window, segments or padding, and nothing else?

For masks that are made outside of a graph, or by ops that no proof reads. A form is guessed from a
few rows and then verified against every cell, so that a guess that is wrong costs time and nothing
else. Verification looks at strips of `STRIP` rows: in most columns of a strip all rows agree, and
the smallest and the largest value of a column say so; the few others, beside the diagonal and
where a window or a segment begins, are compared cell by cell. That reads the mask twice, at the
speed of memory.

Letters: B batch, Nq queries, Nk keys. Query row i stands at position `offset + i`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass

import torch
from torch import Tensor

HIDDEN = -9000
"""An additive mask of at most this hides a key: exp(-9000) is zero in every dtype."""

STRIP = 64
"""Rows that are verified together."""

SAMPLED = 32
"""Rows from which a form is guessed."""

UNKNOWN, EVERY, CAUSAL, SEGMENTS = range(4)
"""Kinds of masks. EVERY: each query sees every key but padding. CAUSAL: with a window or none.

SEGMENTS: a query sees the keys from the start of its segment to its own position; packed documents
and attention in chunks are such masks.
"""


@dataclass(frozen=True)
class MaskForm:
    """What a mask is, in numbers.

    kind: one of the four above; offset: position of the first query; window: in positions, the
    query's own included, 0 for none; padded: whether the key mask hides a key that the
    numbers before allow a query; empty: whether a query sees no key at all.
    """

    kind: int = UNKNOWN
    offset: int = 0
    window: int = 0
    padded: bool = False
    empty: bool = False

    def tensor(self) -> Tensor:
        """The form as an int64 tensor [5] on the CPU."""
        return torch.tensor([int(value) for value in astuple(self)], device="cpu")

    @classmethod
    def from_tensor(cls, numbers: Tensor) -> MaskForm:
        """The form that `tensor` has written."""
        kind, offset, window, padded, empty = numbers.tolist()
        return cls(kind, offset, window, bool(padded), bool(empty))


@dataclass(frozen=True, eq=False)
class ReadMask:
    """A form with its tensors: key_mask bool [B, Nk], first int64 [B, Nq].

    Query i of batch row b sees key j iff `first[b, i] <= j <= offset + i` (for EVERY: always) and
    `key_mask[b, j]`. Of an UNKNOWN mask the tensors say nothing.
    """

    form: MaskForm
    key_mask: Tensor
    first: Tensor


def read_mask(mask: Tensor) -> ReadMask:
    """The form of a mask [B, 1, Nq, Nk]: bool (True is seen), or 0 for seen and -9000 or less.

    Batch rows that share memory are read once. Masks that differ per head are UNKNOWN.
    """
    batch, heads, num_queries, num_keys = mask.shape
    unknown = ReadMask(
        MaskForm(),
        torch.ones(batch, num_keys, dtype=torch.bool, device=mask.device),
        torch.zeros(batch, num_queries, dtype=torch.int64, device=mask.device),
    )
    if 0 in mask.shape or (heads > 1 and mask.stride(1) != 0):
        return unknown
    cells = mask[:, 0] if batch == 1 or mask.stride(0) != 0 else mask[:1, 0]
    cells = cells.view(torch.uint8) if cells.dtype == torch.bool else cells
    rows = torch.linspace(0, num_queries - 1, SAMPLED).long().unique().to(cells.device)
    sample = cells[:, rows]
    seen = shows(sample)
    if not seen.any() or not bool((seen | hides(sample)).all()):
        return unknown
    tops = cells.amax(1)
    key_mask = shows(tops)
    if not bool((key_mask | hides(tops)).all()):
        return unknown
    found = read_causal(cells, key_mask, rows, seen) or read_every(cells, key_mask)
    if found is None:
        return unknown
    return ReadMask(found.form, found.key_mask.expand(batch, -1), found.first.expand(batch, -1))


def shows(cells: Tensor) -> Tensor:
    """Which cells let a key be seen."""
    return cells == 1 if cells.dtype == torch.uint8 else cells == 0


def hides(cells: Tensor) -> Tensor:
    """Which cells hide a key: a cell of an additive mask may do neither."""
    return cells == 0 if cells.dtype == torch.uint8 else cells <= HIDDEN


def read_every(cells: Tensor, key_mask: Tensor) -> ReadMask | None:
    """The form of a mask whose rows are all the same; None if it is another."""
    if not torch.equal(shows(cells.amin(1)), key_mask):
        return None
    first = torch.zeros(cells.shape[:2], dtype=torch.int64, device=cells.device)
    form = MaskForm(EVERY, padded=not bool(key_mask.all()), empty=not bool(key_mask.any(-1).all()))
    return ReadMask(form, key_mask, first)


def read_causal(cells: Tensor, key_mask: Tensor, rows: Tensor, seen: Tensor) -> ReadMask | None:
    """The form of a mask that shows nothing after a query's position; None if it is another.

    cells [B, Nq, Nk]; key_mask: keys that any query sees; rows: sampled; seen: their cells.
    """
    num_queries, num_keys = cells.shape[1:]
    some = seen.any(-1)
    last = num_keys - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)
    offset = int((last - rows)[some].max())
    if offset < 0 or offset + num_queries > num_keys:
        return None
    positions = torch.arange(num_queries, device=cells.device) + offset
    begin = seen.to(torch.uint8).argmax(-1)
    window = int((rows + offset - begin)[some].max()) + 1
    zeros = torch.zeros(cells.shape[:2], dtype=torch.int64, device=cells.device)
    guesses = [(CAUSAL, 0, zeros), (CAUSAL, window, zeros + (positions - window + 1).clamp(min=0))]
    segments = segment_starts(cells, key_mask, positions)
    if segments is not None:
        guesses.append((SEGMENTS, 0, segments))
    keys = torch.arange(num_keys, device=cells.device)
    for kind, width, first in guesses:
        in_range = (keys >= first[:, rows, None]) & (keys <= positions[rows, None])
        if not torch.equal(in_range & key_mask[:, None], seen):
            continue
        if not all(map(verify, cells, key_mask, first, [positions] * len(cells))):
            continue
        before = torch.nn.functional.pad(key_mask.long().cumsum(-1), (1, 0))
        counts = before[:, positions + 1] - before.gather(1, first)
        padded = not torch.equal(counts, positions + 1 - first)
        return ReadMask(
            MaskForm(kind, offset, width, padded, not bool(counts.all())), key_mask, first
        )
    return None


def segment_starts(cells: Tensor, key_mask: Tensor, positions: Tensor) -> Tensor | None:
    """Where each query's segment starts, int64 [B, Nq]: where the key before its own is hidden.

    None where there are so many segments that none can be long.
    """
    batch, num_queries, _ = cells.shape
    before = (positions - 1).clamp(min=0)
    own = torch.arange(num_queries, device=cells.device)
    starts = hides(cells[:, own, before]) & key_mask[:, before] & (positions > 0)
    starts[:, 0] = False
    if int(starts.sum(-1).max()) > max(8, num_queries // STRIP):
        return None
    begin = shows(cells[:, 0]).to(torch.uint8).argmax(-1)  # of the first row, cached keys included
    first = torch.where(starts, positions, 0)
    first[:, 0] = torch.minimum(begin, positions[:1].expand(batch))
    return first.cummax(-1).values


def verify(cells: Tensor, key_mask: Tensor, first: Tensor, positions: Tensor) -> bool:
    """Whether every cell [Nq, Nk] is as claimed: seen iff first <= key <= position, and no padding.

    key_mask: keys that any query sees, so that no query sees another. first does not decrease.
    """
    num_queries, num_keys = cells.shape
    keys = torch.arange(num_keys, device=cells.device)
    starts, ends = first.tolist(), positions.tolist()

    def mixed(rows: slice, low: int, high: int) -> bool:
        if low >= high:
            return True
        part, own = cells[rows, low:high], keys[low:high]
        seen = (own >= first[rows, None]) & (own <= positions[rows, None]) & key_mask[low:high]
        return torch.equal(shows(part), seen) and torch.equal(hides(part), ~seen)

    for start in range(0, num_queries, STRIP):
        rows = slice(start, min(num_queries, start + STRIP))
        strip = cells[rows]
        # The keys [low, high) are seen by all rows, those outside of [least, most) by none.
        least, most = starts[rows.start], ends[rows.stop - 1] + 1
        low, high = starts[rows.stop - 1], ends[rows.start] + 1
        if low >= high:
            low = high = min(low, most)
        if low < high and not torch.equal(shows(strip[:, low:high].amin(0)), key_mask[low:high]):
            return False
        for outside in (strip[:, :least], strip[:, most:]):
            if outside.shape[1] and not bool(hides(outside.amax(0)).all()):
                return False
        if not (mixed(rows, least, low) and mixed(rows, high, most)):
            return False
    return True
