"""Kernels of a graph are built in the background while the inner compiler works on the rest.

They are built by using them, on one block of zeros: whatever a pattern's estimator and the
attention need is then in memory or being compiled when the first prompt arrives, and several
libraries are compiled at once. A prompt that comes earlier waits for the one that it needs.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable, Sequence

import torch

from mpass.graph.nodes import example
from mpass.lowering.device import Lowering
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, diagonal_slots, whole_index
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.patterns.base import Pattern
from mpass.plan import AttentionPlan

log = logging.getLogger(__name__)


def start_kernels(plans: Sequence[AttentionPlan]) -> list[threading.Thread]:
    """Start a thread per kernel that the planned sites need and that takes long to build, once.

    Returns the threads; nothing has to wait for them. What goes wrong in one goes wrong again, and
    is told, where the kernel is used.
    """
    threads: dict[threading.Thread, None] = {}
    for plan in plans:
        site = plan.site
        query, key, value = (example(node) for node in (site.query, site.key, site.value))
        inputs = AttentionInputs(query, key, value, AttentionMask(), 1.0, site.softcap)
        lowering = device_lowering(query.device)
        if not lowering.builds_ahead or lowering.serves(inputs):
            continue
        dtype, head_dim, value_dim = site.compute_dtype, int(query.shape[-1]), int(value.shape[-1])
        threads[start_attention(lowering, dtype, head_dim, value_dim, site.softcap)] = None
        for cls in dict.fromkeys(map(type, plan.patterns)):
            threads[start_estimator(lowering, cls, dtype, head_dim)] = None
    return list(threads)


@functools.cache
def start_attention(
    lowering: Lowering, dtype: torch.dtype, head_dim: int, value_dim: int, softcap: float
) -> threading.Thread:
    """One block of sparse attention."""

    def run() -> None:
        query = torch.zeros(1, 1, BLOCK, head_dim, dtype=dtype, device=lowering.device)
        value = torch.zeros(1, 1, BLOCK, value_dim, dtype=dtype, device=lowering.device)
        index = whole_index(query, 1, IndexWidth(), diagonal_slots(1))
        inputs = AttentionInputs(query, query, value, AttentionMask(), 1.0, softcap)
        lowering.sparse_attention(inputs, index)

    return start(run, f"attention, {dtype}, D={head_dim}, DV={value_dim}")


@functools.cache
def start_estimator(
    lowering: Lowering, cls: type[Pattern], dtype: torch.dtype, head_dim: int
) -> threading.Thread:
    """One block of a pattern's estimator, with the default parameters."""

    def run() -> None:
        query = torch.zeros(1, 1, BLOCK, head_dim, dtype=dtype, device=lowering.device)
        cls.estimate(EstimateInputs(query, query, AttentionMask(), [0], 1.0), [cls()])

    return start(run, f"{cls.name}, {dtype}, D={head_dim}")


def start(run: Callable[[], None], name: str) -> threading.Thread:
    """Run it in a thread that the process does not wait for."""

    def guarded() -> None:
        try:
            with torch.no_grad():
                run()
        except Exception as error:  # the op that needs the kernel tells it, with its traceback
            log.debug("building %s in the background: %s", name, error)

    thread = threading.Thread(target=guarded, name=f"mpass: {name}", daemon=True)
    thread.start()
    return thread
