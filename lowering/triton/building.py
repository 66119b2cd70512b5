"""Kernels that are being compiled: a launch waits for its own instead of compiling it again."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from mpass.lowering.triton.spec import TritonKernelSpec

_lock = threading.Lock()
_pending: dict[tuple[TritonKernelSpec, str], list[threading.Event]] = {}


def announce(spec: TritonKernelSpec, kernel: str) -> threading.Event:
    """Tell that a kernel will be compiled; whoever does must end it by `compiling`."""
    event = threading.Event()
    with _lock:
        _pending.setdefault((spec, kernel), []).append(event)
    return event


@contextlib.contextmanager
def compiling(spec: TritonKernelSpec, kernel: str, event: threading.Event) -> Iterator[None]:
    """Launches of the kernel wait until this is left, by whatever way."""
    try:
        yield
    finally:
        with _lock:
            events = _pending[spec, kernel]
            events.remove(event)
            if not events:
                del _pending[spec, kernel]
        event.set()


def wait_for(spec: TritonKernelSpec, kernel: str) -> None:
    """Return when no other thread compiles this kernel any more."""
    if _pending:  # empty but for the first seconds of a process
        for event in tuple(_pending.get((spec, kernel), ())):
            event.wait()
