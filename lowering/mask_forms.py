"""Reading a mask tensor: is it causal, with a window, segments or padding, and nothing else?

For masks that are made outside of a graph, or by ops that no proof reads. A form is guessed from a
few rows and then verified against every cell, so that a guess that is wrong costs time and nothing
else. Verification looks at strips of `STRIP` rows: in most columns of a strip all rows agree, and
the smallest and the largest value of a column say so; the few others, beside the diagonal, and
where a window, a segment or a span begins or ends, are compared cell by cell. That reads the mask
twice, at the speed of memory.

Letters: B batch, Nq queries, Nk keys. Query row i stands at position `offset + i`.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass, replace

import torch
from torch import Tensor

HIDDEN = -9000
"""An additive mask of at most this hides a key: exp(-9000) is zero in every dtype."""

STRIP = 64
"""Rows that are verified together."""

SAMPLED = 32
"""Rows from which a form is guessed."""

UNKNOWN, EVERY, CAUSAL, SEGMENTS, SPANS = range(5)
"""Kinds of masks. EVERY: each query sees every key but padding. CAUSAL: with a window or none.

SEGMENTS: a query sees the keys from the start of its segment to its own position; packed documents
and attention in chunks are such masks. SPANS: causal, but the queries of a span see all of their
span: an image of a prompt, or a prefix that sees itself; with a window or none.
"""


@dataclass(frozen=True)
class MaskForm:
    """What a mask is, in numbers.

    kind: one of the five above; offset: position of the first query; window: in positions, the
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
    """A form with its tensors: key_mask bool [B, Nk], first and last int64 [B, Nq].

    Query i of batch row b sees key j iff `first[b, i] <= j <= last[b, i]` and `key_mask[b, j]`.
    But for EVERY and SPANS `last` is the query's own position. Neither ever decreases from one
    query to the next. Of an UNKNOWN mask the tensors say nothing.
    """

    form: MaskForm
    key_mask: Tensor
    first: Tensor
    last: Tensor


def read_mask(mask: Tensor) -> ReadMask:
    """The form of a mask [B, 1, Nq, Nk]: bool (True is seen), or 0 for seen and -9000 or less.

    Batch rows that share memory are read once. Masks that differ per head are UNKNOWN.
    """
    batch, heads, num_queries, num_keys = mask.shape
    zeros = torch.zeros(batch, num_queries, dtype=torch.int64, device=mask.device)
    every = torch.ones(batch, num_keys, dtype=torch.bool, device=mask.device)
    unknown = ReadMask(MaskForm(), every, zeros, zeros)
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
    found = (
        read_causal(cells, key_mask, rows, seen)
        or read_every(cells, key_mask)
        or read_spans(cells, key_mask, rows, seen)
    )
    if found is None:
        return unknown
    tensors = (found.key_mask, found.first, found.last)
    return ReadMask(found.form, *(tensor.expand(batch, -1) for tensor in tensors))


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
    return ReadMask(form, key_mask, first, first + cells.shape[2] - 1)


def read_causal(cells: Tensor, key_mask: Tensor, rows: Tensor, seen: Tensor) -> ReadMask | None:
    """The form of a mask that shows nothing after a query's position; None if it is another.

    cells [B, Nq, Nk]; key_mask: keys that any query sees; rows: sampled; seen: their cells.
    """
    num_queries, num_keys = cells.shape[1:]
    some = seen.any(-1)
    offset = int((last_seen(seen) - rows)[some].max())
    if offset < 0 or offset + num_queries > num_keys:
        return None
    positions = torch.arange(num_queries, device=cells.device) + offset
    last = positions.expand(cells.shape[:2])
    guesses = [(CAUSAL, *guess) for guess in windows(rows, seen, positions)]
    segments = segment_starts(cells, key_mask, positions)
    if segments is not None:
        guesses.append((SEGMENTS, 0, segments))
    for kind, width, first in guesses:
        form = MaskForm(kind, offset, width)
        found = verified(cells, ReadMask(form, key_mask, first.expand_as(last), last), rows, seen)
        if found is not None:
            return found
    return None


def read_spans(cells: Tensor, key_mask: Tensor, rows: Tensor, seen: Tensor) -> ReadMask | None:
    """The form of a causal mask whose spans see themselves; None if it is another.

    Arguments as of `read_causal`. The last query is rarely in a span, so that it says where the
    queries stand; else they are taken to be the last ones.
    """
    num_queries, num_keys = cells.shape[1:]
    ends = last_seen(shows(cells[:, -1:]))[:, 0] - num_queries + 1
    for offset in dict.fromkeys((num_keys - num_queries, int(ends.max()))):
        if offset < 0 or offset + num_queries > num_keys:
            continue
        positions = torch.arange(num_queries, device=cells.device) + offset
        last = span_ends(cells, key_mask, positions)
        if not bool(outside_spans(last, positions).any()):
            continue  # Nothing is causal in it.
        for width, first in windows(rows, seen, positions):
            read = ReadMask(MaskForm(SPANS, offset, width), key_mask, first.expand_as(last), last)
            found = verified(cells, read, rows, seen)
            if found is not None:
                return found
    return None


def last_seen(seen: Tensor) -> Tensor:
    """The last key that each row [.., Nk] sees; that of a row without keys is the last of all."""
    return seen.shape[-1] - 1 - seen.flip(-1).to(torch.uint8).argmax(-1)


def windows(rows: Tensor, seen: Tensor, positions: Tensor) -> list[tuple[int, Tensor]]:
    """What the window of a mask might be, and the first keys [Nq]: none, or as the sampled rows."""
    begin = seen.to(torch.uint8).argmax(-1)
    width = int((positions[rows] - begin)[seen.any(-1)].max()) + 1
    return [(0, torch.zeros_like(positions)), (width, (positions - width + 1).clamp(min=0))]


def verified(cells: Tensor, read: ReadMask, rows: Tensor, seen: Tensor) -> ReadMask | None:
    """A guess with what its form says of padding and empty rows; None if it is wrong anywhere."""
    keys = torch.arange(cells.shape[2], device=cells.device)
    first, last = read.first, read.last
    in_range = (keys >= first[:, rows, None]) & (keys <= last[:, rows, None])
    if not torch.equal(in_range & read.key_mask[:, None], seen):
        return None
    if not all(map(verify, cells, read.key_mask, first, last)):
        return None
    before = torch.nn.functional.pad(read.key_mask.long().cumsum(-1), (1, 0))
    counts = before.gather(1, last + 1) - before.gather(1, first)
    padded = not torch.equal(counts, last + 1 - first)
    form = replace(read.form, padded=padded, empty=not bool(counts.all()))
    return replace(read, form=form)


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


def span_ends(cells: Tensor, key_mask: Tensor, positions: Tensor) -> Tensor:
    """Where each query's span ends, int64 [B, Nq]: at the first query blind to the next key.

    The next key is the next one that any query sees, since padding may stand before a span or in
    it. Outside of a span a query's own position is the end.
    """
    batch, num_queries, num_keys = cells.shape
    keys = torch.arange(num_keys, device=cells.device)
    later = torch.where(key_mask, keys, num_keys).flip(-1).cummin(-1).values.flip(-1)
    later = torch.nn.functional.pad(later, (0, 1), value=num_keys)[:, positions + 1]
    own = torch.arange(num_queries, device=cells.device)
    goes_on = shows(cells[torch.arange(batch)[:, None], own, later.clamp(max=num_keys - 1)])
    goes_on &= later < num_keys
    ends = torch.where(goes_on, num_keys - 1, positions)
    return ends.flip(-1).cummin(-1).values.flip(-1)


def outside_spans(last: Tensor, positions: Tensor) -> Tensor:
    """Which queries [.., Nq] are in no span: bool, from the last key of each and its position."""
    before = torch.nn.functional.pad(last[..., :-1], (1, 0), value=-1)
    return (last == positions) & (last != before)


def verify(cells: Tensor, key_mask: Tensor, first: Tensor, last: Tensor) -> bool:
    """Whether every cell [Nq, Nk] is as claimed: seen iff first <= key <= last, and no padding.

    key_mask: keys that any query sees, so that no query sees another. first and last do not
    decrease.
    """
    num_queries, num_keys = cells.shape
    keys = torch.arange(num_keys, device=cells.device)
    starts, ends = first.tolist(), last.tolist()

    def mixed(rows: slice, low: int, high: int) -> bool:
        if low >= high:
            return True
        part, own = cells[rows, low:high], keys[low:high]
        seen = (own >= first[rows, None]) & (own <= last[rows, None]) & key_mask[low:high]
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
