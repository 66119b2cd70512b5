"""Kernels that are being compiled: a launch waits for its own instead of compiling it again."""

from __future__ import annotations

import contextlib
import threading
from collections import defaultdict
from collections.abc import Iterator

from mpass.lowering.triton.spec import TritonKernelSpec

_locks: defaultdict[tuple[TritonKernelSpec, str], threading.Lock] = defaultdict(threading.Lock)
_compiling: list[tuple[TritonKernelSpec, str]] = []


@contextlib.contextmanager
def compiling(spec: TritonKernelSpec, kernel: str) -> Iterator[None]:
    """Launches of the kernel wait until this is left, by whatever way.

    So does another thread that compiles the kernel for other arguments: what Triton keeps for a
    kernel is made without a lock.
    """
    with _locks[spec, kernel]:
        _compiling.append((spec, kernel))
        try:
            yield
        finally:
            _compiling.remove((spec, kernel))


def wait_for(spec: TritonKernelSpec, kernel: str) -> None:
    """Return when no thread compiles this kernel any more; that thread must not call it."""
    if (spec, kernel) in _compiling:  # empty but for the first seconds of a process
        with _locks[spec, kernel]:
            pass
