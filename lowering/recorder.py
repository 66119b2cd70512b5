"""What the ops really did while a model ran, for those who ask: `with record() as log: ...`.

Off, it costs two reads of context variables per op call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field

from torch import Tensor

from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.readback import Readback


@dataclass(frozen=True, slots=True, eq=False)
class AttentionCall:
    """One executed sparse attention.

    layer: the number that the layer has in the graph; -1 if it is unknown.
    lowering: "cpu", "triton", "reference" or "dense".
    computed: the share of the mask's cells that was computed, fp64 [B, H], which a device may still
    be about to count: `density` waits for it.
    num_queries, num_keys: the lengths.
    index_bytes: the memory of the index.
    reason: why every key was looked at, by dense attention or by a kernel whose estimator had
    failed, in words; "" if it was not.
    """

    layer: int
    lowering: str
    computed: Readback
    num_queries: int
    num_keys: int
    index_bytes: int
    reason: str = ""

    @property
    def density(self) -> Tensor:
        """The share of the mask's cells that was computed: fp64 [B, H] on the host.

        It is NaN of a call that a CUDA graph has captured.
        """
        return self.computed.read()


@dataclass(frozen=True, slots=True, eq=False)
class CallInputs:
    """What one sparse attention read; arguments as of the op.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv], None where outputs do not count.
    """

    query: Tensor
    key: Tensor
    index: SparseIndex
    mask: AttentionMask
    scale: float
    softcap: float
    sinks: Tensor | None
    value: Tensor | None = None


@dataclass(slots=True)
class Log:
    """Calls in the order in which they ran; `inspect` sees each with what it read, as it runs.

    dense_reason: why the estimation of the next call was left out, if it was.
    """

    calls: list[AttentionCall] = field(default_factory=list)
    dense_reason: str = ""
    inspect: Callable[[AttentionCall, CallInputs], None] | None = None

    def density(self) -> float:
        """Mean density over all calls, batch rows and heads; 1.0 if nothing was recorded."""
        if not self.calls:
            return 1.0
        return sum(float(call.density.mean()) for call in self.calls) / len(self.calls)


Call = AttentionCall
"""The older name."""

Operands = CallInputs
"""The older name."""

_active: ContextVar[Log | None] = ContextVar("mpass_record", default=None)


_watcher: ContextVar[Callable[[], None] | None] = ContextVar("mpass_watcher", default=None)


@contextmanager
def watch_compiled(notice: Callable[[], None]) -> Iterator[None]:
    """Call `notice` whenever a graph of ours is compiled, or one of its attentions runs, inside."""
    token = _watcher.set(notice)
    try:
        yield
    finally:
        _watcher.reset(token)


def tell_watcher() -> None:
    """Say that a graph of ours is compiled or runs."""
    notice = _watcher.get()
    if notice is not None:
        notice()


def active_log() -> Log | None:
    """The log that calls are to be added to, or None."""
    return _active.get()


def note_dense(reason: str) -> None:
    """Tell the log why an estimator leaves its work undone: dense attention will run."""
    log = active_log()
    if log is not None:
        log.dense_reason = reason


@contextmanager
def record(inspect: Callable[[AttentionCall, CallInputs], None] | None = None) -> Iterator[Log]:
    """Collect what every sparse attention inside the block computes, an `AttentionCall` each.

    inspect: is called with every call and with what it read, which nothing keeps afterwards.
    """
    log = Log(inspect=inspect)
    token = _active.set(log)
    try:
        yield log
    finally:
        _active.reset(token)
