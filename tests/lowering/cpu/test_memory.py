"""Generated C++ that runs out of memory: an error of Python's, not the end of the process."""

from __future__ import annotations

from pathlib import Path

import torch

from mpass.lowering.cpu.attention import sparse_attention
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.support import kernel_spec
from mpass.lowering.index import (
    ALL_DIAGONALS,
    AttentionMask,
    IndexWidth,
    diagonal_slots,
    empty_index,
)
from mpass.lowering.inputs import AttentionInputs
from tests.helpers.cpu_cases import needs_kernels
from tests.helpers.paths import ROOT
from tests.helpers.processes import run_python

THREADS = 16
STEP = 64 << 10  # less than what one thread works on
STEPS = 192


@needs_kernels
def test_running_out_of_memory_raises_at_every_allocation() -> None:
    done = run_python(
        __file__,
        PYTHONPATH=str(ROOT),
        MALLOC_ARENA_MAX="1",
        MALLOC_TRIM_THRESHOLD_="0",
        MALLOC_MMAP_THRESHOLD_="65536",
    )
    raised, returned = map(int, done.stdout.split())
    assert raised > THREADS
    assert returned > 0


def run_with_less_and_less_memory() -> None:
    """What the limited process does: print how many calls raised, and how many returned."""
    import resource

    index = empty_index(torch.empty(1, 2, 640, 1), 10, IndexWidth(), diagonal_slots(2))
    index.diagonal_count.fill_(ALL_DIAGONALS)

    def run(head_dim: int = 64) -> None:
        query = torch.zeros(1, 2, 640, head_dim)
        key = torch.zeros(1, 1, 640, head_dim)
        sparse_attention(AttentionInputs(query, key, key, AttentionMask(), 0.125), index)

    torch.set_num_threads(THREADS)
    run(head_dim=32)  # starts the threads; another library, so that it keeps no memory for this one
    # Compiled, not run: with fewer threads the others would end, and start anew without memory.
    query, key = torch.empty(1, 2, 640, 64), torch.empty(1, 1, 640, 64)
    load_library(kernel_spec(AttentionInputs(query, key, key, AttentionMask(), 1.0)))
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    raised = returned = 0
    for step in range(STEPS):
        _, hard = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (used + step * STEP, hard))
        try:
            run()
            returned += 1
        except (MemoryError, RuntimeError) as error:  # torch's own allocator raises the latter
            assert isinstance(error, MemoryError) or "memory" in str(error), error
            raised += 1
        resource.setrlimit(resource.RLIMIT_AS, (hard, hard))
    print(raised, returned)


if __name__ == "__main__":
    run_with_less_and_less_memory()
