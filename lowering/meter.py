"""What sparse attention lost while a model ran: measured on some rows of each call, as it runs.

`options={"measure": True}` gives the attention op a number by which its losses are kept here; the
rows are those of mpass.lowering.exact_rows. Nobody waits for the numbers: they are sent to the host
and added up when somebody asks (`loss_of`). While a CUDA graph is captured nothing is measured,
since a replay runs no Python. Letters: B batch, H query heads, Nq queries, R rows looked at.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.exact_rows import rows_to_look_at
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs, RowLosses
from mpass.lowering.readback import Readback, read_later

ROWS = 48
"""Most query rows of a call that are computed exactly: 0.6% of a prompt of 8192 tokens."""

MOST_KEPT = 4096
"""Attentions whose losses are kept; the one measured least recently is forgotten."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What one attention of a model lost on its last prompt, one number per query head.

    error: root of the squared distance of its output to the exact one over the exact one's square,
    both summed over the rows looked at; lost: the share of softmax mass on keys that were not
    computed, mean over rows; worst: of the row that lost most; rows: how many were looked at (batch
    rows and chunks of the prompt together); dense: how many of the calls ran dense, of `calls`.
    """

    error: tuple[float, ...]
    lost: tuple[float, ...]
    worst: tuple[float, ...]
    rows: int
    calls: int
    dense: int


@dataclass(slots=True)
class Tally:
    """Sums of one attention since its prompt began, in parts: fp64 [5, H] each.

    parts: squared error, square of the exact output, lost mass, rows; greatest lost mass of a row.
    """

    parts: list[Readback] = field(default_factory=list)
    calls: int = 0
    dense: int = 0


@dataclass(slots=True)
class Meter:
    """What was measured, by the numbers of attentions."""

    known: OrderedDict[int, Tally] = field(default_factory=OrderedDict)

    def tally(self, number: int, fresh: bool) -> Tally:
        """The sums of an attention; empty ones where a prompt begins."""
        found = None if fresh else self.known.get(number)
        found = found or Tally()
        self.known.pop(number, None)
        self.known[number] = found
        if len(self.known) > MOST_KEPT:
            self.known.popitem(last=False)
        return found


_meter = Meter()

_paused: ContextVar[bool] = ContextVar("mpass_meter_paused", default=False)


@contextmanager
def paused() -> Iterator[None]:
    """Measure nothing inside, so that it can be timed without."""
    token = _paused.set(True)
    try:
        yield
    finally:
        _paused.reset(token)


def start_prompt(number: int) -> None:
    """Forget what was measured of an attention: a prompt begins."""
    if not _paused.get():
        _meter.tally(number, fresh=True)


def rows_of_call(query: Tensor) -> int:
    """How many rows of a call are measured: none while paused.

    None either while a CUDA graph is captured, since that runs no Python later.
    """
    if _paused.get() or (query.is_cuda and torch.cuda.is_current_stream_capturing()):
        return 0
    return rows_to_look_at(query.shape[2], ROWS)


def measure_call(
    inputs: AttentionInputs,
    index: SparseIndex,
    out: Tensor,
    number: int,
    *,
    dense: bool,
    losses: RowLosses | None = None,
) -> None:
    """Add to what is known of an attention what one call of it lost.

    out: [B, H, Nq, Dv], what was computed; number: of the attention, negative where the call is a
    part of one whose `start_prompt` the caller has told; else a call without a prefix begins a
    prompt. dense: whether the call computed every key, and so lost nothing. losses: of
    `rows_of_call` rows with outputs, where somebody has looked before.
    """
    rows = rows_of_call(inputs.query)
    if not rows:
        return
    tally = _meter.tally(abs(number), fresh=number > 0 and inputs.mask.query_offset == 0)
    tally.calls += 1
    if dense:
        tally.dense += 1
        return
    found = losses or choose_lowering(inputs).row_losses(inputs, index, rows, True)
    assert found.exact is not None
    real = found.counted[:, None]
    exact = found.exact
    gap = (out[:, :, found.rows].to(exact.dtype) - exact).square().sum(-1)
    square = exact.square().sum(-1)
    per_row = torch.stack([gap, square, found.lost, torch.ones_like(found.lost)]) * real
    sums = per_row.sum((1, 3), dtype=torch.float64)
    worst = (found.lost * real).amax((0, 2))[None].to(sums.dtype)
    tally.parts.append(read_later(torch.cat([sums, worst])))


def loss_of(number: int) -> Loss | None:
    """What an attention lost on its last prompt; None if it was not measured.

    Waits for the device where its numbers are not there yet.
    """
    tally = _meter.known.get(number)
    if tally is None or tally.calls == 0:
        return None
    if not tally.parts:
        return Loss((), (), (), 0, tally.calls, tally.dense)
    parts = torch.stack([part.read() for part in tally.parts])
    gap, square, lost, rows = parts[:, :4].sum(0)
    worst = parts[:, 4].amax(0)
    return Loss(
        error=tuple((gap / square.clamp(min=1e-30)).sqrt().tolist()),
        lost=tuple((lost / rows.clamp(min=1)).tolist()),
        worst=tuple(worst.tolist()),
        rows=int(rows.max()),
        calls=tally.calls,
        dense=tally.dense,
    )
