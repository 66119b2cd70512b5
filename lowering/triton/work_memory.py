"""What earlier calls of an attention selected, read without waiting for the GPU.

An op knows what an index selects only where the device has counted it, and must not wait for that.
So some calls copy the share of the dense work that they selected into pinned memory of the host,
with an event behind the copy; later calls of the same attention, of prompts of about the same
length, read it once the event has passed. Where sparse attention is slower at that share, calls run
dense, and now and then one runs sparse to look again. What the host takes to launch a call is known
at once; where that is longer than dense attention takes, calls run dense as well. Dense attention
is always right, so that what is remembered decides speed and nothing else.

A CUDA graph is captured as if nothing was remembered, and nothing is while it is captured.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

from torch import Tensor

from mpass.lowering.crossover import PatternWork

Key = tuple[object, ...]

MOST_REMEMBERED = 4096
"""Attentions that are remembered at a time; the one that was used least recently is forgotten."""

CALLS_PER_READING = 4
"""Sparse calls of which one is measured: it takes a few small kernels."""


class Reading(Protocol):
    """A number that a device is about to write."""

    def ready(self) -> bool:
        """Whether it is there; never waits."""

    def value(self) -> float:
        """The number, once it is there."""


@dataclass(slots=True)
class Remembered:
    """One attention.

    share: of the dense work, as last read; None before. pending: the reading that is under way.
    host: the least seconds between beginning and end of a sparse call, before it was done.
    parts: what each pattern of the layer told of itself, by the ops' names. started: when the call
    has begun that runs. running: whether a call has begun, so that its decision stands; dense: why
    it runs dense, "" if it does not. sparse_calls, dense_calls: since one of the other
    kind, and since something new was known.

    Threads that call one attention at the same time may disagree about a call: its estimator then
    lists every block for a sparse kernel, or an index is made for dense attention. Both are right.
    """

    share: float | None = None
    pending: Reading | None = None
    host: float = math.inf
    started: float = 0.0
    parts: dict[str, tuple[PatternWork, ...]] = field(default_factory=dict)
    running: bool = False
    dense: str = ""
    sparse_calls: int = 0
    dense_calls: int = 0


@dataclass(frozen=True, slots=True)
class Limits:
    """What decides about a call whose share of the work is known.

    most: share up to which it stays sparse; dense: seconds of dense attention; interval: of the
    seconds that sparse attention takes, the dense calls until one looks again; sparse: those at the
    share that was read.
    """

    most: float
    dense: float
    sparse: float
    interval: Callable[[float], int]


AskLimits = Callable[[tuple[PatternWork, ...], float], Limits]
"""What decides, of the patterns of a layer and the share that was read."""


@dataclass(slots=True)
class WorkMemory:
    """All attentions of one device.

    start: begins to read a share, fp32 [], that the device is about to count.
    """

    start: Callable[[Tensor], Reading]
    known: OrderedDict[Key, Remembered] = field(default_factory=OrderedDict)

    def recall(self, key: Key) -> Remembered:
        """What is known of an attention; made if it is new."""
        found = self.known.pop(key, None) or Remembered()
        self.known[key] = found
        if len(self.known) > MOST_REMEMBERED:
            self.known.popitem(last=False)
        return found

    def begin(
        self,
        key: Key,
        name: str,
        parts: tuple[PatternWork, ...],
        limits: AskLimits,
    ) -> str:
        """Why a call runs dense, in words; "" for sparse. All ops of one call get one answer.

        name, parts: of the op that asks, and the patterns that it estimates. limits: of all parts
        of the layer and the share that was read.
        """
        own = self.recall(key)
        own.parts[name] = parts
        if not own.running:
            own.running, own.started = True, time.perf_counter()
            own.dense = self.reason(own, limits)
        return own.dense

    def reason(self, own: Remembered, limits: AskLimits) -> str:
        """Why a new call runs dense, in words; "" for sparse."""
        if own.pending is not None and own.pending.ready():
            own.share, own.pending, own.dense_calls = own.pending.value(), None, 0
        if own.share is None:
            return ""
        found = limits(tuple(part for some in own.parts.values() for part in some), own.share)
        looked = own.pending is not None  # and what was seen is still to come
        if not looked and own.dense_calls >= found.interval(max(found.sparse, own.host)):
            return ""
        if own.share > found.most:
            return (
                f"{own.share:.0%} of the work was selected in an earlier call, sparse pays up to "
                f"{found.most:.0%} here"
            )
        if found.dense < own.host < math.inf:
            return (
                f"launching it took {1e3 * own.host:.2g} ms in earlier calls, dense attention "
                f"takes {1e3 * found.dense:.2g} ms here"
            )
        return ""

    def decided(self, key: Key) -> str:
        """What `begin` has answered for the call that runs."""
        own = self.recall(key)
        return own.dense if own.running else ""

    def finish(self, key: Key, share: Callable[[], Tensor]) -> None:
        """End a call; share: has the device count what a sparse one selected."""
        own = self.recall(key)
        if not own.running:
            return
        own.running = False
        if own.dense:
            own.dense_calls += 1
            own.sparse_calls = 0
            return
        if own.sparse_calls or own.dense_calls:  # the first call of all may build kernels
            own.host = min(own.host, time.perf_counter() - own.started)
        looking = own.share is None or own.dense_calls > 0
        if own.pending is None and (looking or own.sparse_calls % CALLS_PER_READING == 0):
            own.pending = self.start(share())
        # A look was taken: until it is read, what was known before counts.
        own.dense_calls = 0
        own.sparse_calls += 1
