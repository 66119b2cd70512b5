"""The rates of this machine's GPUs: timed once if that is asked for, and kept in the user's cache.

The table of chips serves until then. `MPASS_REMEASURE=1` in the environment times dense attention
and our kernel when the first attention is planned for a device (seconds, most of them for building
a kernel) and keeps the rates for later processes, as for CPUs. What comes out must lie within what
the chip can do, or the table goes on to serve.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from mpass.files import cache_dir, write_whole
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, diagonal_slots, whole_index
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.chips import Chip
from mpass.lowering.triton.cost_model import ROW_BLOCKS

log = logging.getLogger(__name__)

VERSION = 1
"""Of the measurement and of the file; files of another version are replaced."""

REMEASURE = "MPASS_REMEASURE"

LENGTH = 16384
"""Tokens at which both attentions are timed: the chip's table gives its rates there."""

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Of the attention that is timed: those of the table's rates."""

REPEATS = 5

LEAST_SHARE = 0.02
"""Of the chip's peak rate, below which a timing is not believed; and above it none is."""

LAUNCHES = (1.0, 2000.0)
"""Microseconds that a launch may take the host; 25 to 200 so far."""

CALL_LAUNCHES, CALL_OPS = 3, 8
"""What one call of the attention launches: generated kernels and torch ops."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """TFLOP/s of dense attention and of our kernel, and microseconds of a launch: as of `Chip`."""

    dense: float
    sparse: float
    launch: float


def measured_chip(chip: Chip, device: torch.device) -> Chip:
    """The chip with the rates that were measured on this machine; as it is where none were."""
    machine = describe_machine(device)
    path = rates_path(machine)
    if os.environ.get(REMEASURE, "0") not in ("", "0"):
        found = measured_rates(device)
        if isinstance(found, str) or not plausible(found, chip):
            log.warning("the rates of %s were not measured (%s)", machine["device"], found)
            return chip
        save(path, machine, found)
    kept = load(path, machine)
    if kept is None or not plausible(kept, chip):
        return chip
    on = f"this machine, torch {machine['torch']}, triton {machine['triton']}"
    return dataclasses.replace(chip, measured=on, op=kept.launch / 6, **dataclasses.asdict(kept))


def as_rates(dense: float, sparse: float, call: float) -> Rates:
    """The rates that timings show.

    dense, sparse: seconds of causal attention over `LENGTH` tokens, by our kernel over every block;
    call: seconds of the host for a call of our kernel.
    """
    blocks = LENGTH // BLOCK
    row = (blocks + 1) / 2
    cells = 4.0 * HEADS * HEAD_DIM / 1e12
    most = cells * BLOCK**2 * blocks * row / sparse * (row + ROW_BLOCKS) / row
    # An op takes a sixth of a launch, as in the table.
    launch = 1e6 * call / (CALL_LAUNCHES + CALL_OPS / 6)
    return Rates(cells * LENGTH**2 / 2 / dense, most, launch)


def plausible(rates: Rates, chip: Chip) -> bool:
    """Whether a chip can have such rates."""
    low, high = LEAST_SHARE * chip.teraflops, 1.1 * chip.teraflops
    fast = all(low < rate < high for rate in (rates.dense, rates.sparse))
    return fast and LAUNCHES[0] < rates.launch < LAUNCHES[1]


def measure(device: torch.device) -> Rates | None:
    """Time both attentions on a GPU; None where that cannot be done now."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    from mpass.lowering.triton.attention import sparse_attention  # its launchers load Triton

    def inputs_of(length: int) -> AttentionInputs:
        generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is
        query, key = (
            torch.randn(1, heads, length, HEAD_DIM, device=device, generator=generator).bfloat16()
            for heads in (HEADS, KV_HEADS)
        )
        return AttentionInputs(query, key, key, AttentionMask(), HEAD_DIM**-0.5)

    def sparse(inputs: AttentionInputs) -> Callable[[], object]:
        rows = inputs.query.shape[2] // BLOCK
        index = whole_index(inputs.query, rows, IndexWidth(), diagonal_slots(HEADS))
        return functools.partial(sparse_attention, inputs, index)

    with unset_fake_temporarily(), torch.no_grad(), torch.cuda.device(device):
        inputs = inputs_of(LENGTH)

        def dense() -> object:
            query, key, value = inputs.query, inputs.key, inputs.value
            return F.scaled_dot_product_attention(
                query, key, value, is_causal=True, enable_gqa=True
            )

        seconds = time_on(dense), time_on(sparse(inputs))
        return as_rates(*seconds, time_launches(sparse(inputs_of(2 * BLOCK))))


def measured_rates(device: torch.device) -> Rates | str:
    """`measure`, or why it could not be done: a chip's table serves then."""
    try:
        return measure(device) or "there is no GPU, or a CUDA graph is being captured"
    except Exception as error:  # a kernel that cannot be built, or no memory
        return f"{type(error).__name__}: {error}"


def time_launches(run: Callable[[], object]) -> float:
    """Seconds until a call returns, the least of some, with nothing in the GPU's queue."""
    best = float("inf")
    for _ in range(2 * REPEATS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def time_on(run: Callable[[], object]) -> float:
    """Seconds of a run on the current GPU, the median of some."""
    run()
    times = []
    for _ in range(REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3)
    return statistics.median(times)


def describe_machine(device: torch.device) -> dict[str, str]:
    """All that rates depend on."""
    import triton

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
    return {
        "device": name,
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
    }


def rates_path(machine: dict[str, str]) -> Path:
    """File of some rates, named by all that they depend on."""
    name = hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()[:16]
    return cache_dir() / "gpu-cost" / f"{name}.json"


def load(path: Path, machine: dict[str, str]) -> Rates | None:
    """The rates of a file, or None if it is not there, broken, old or of another machine."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["machine"] != machine:
            return None
        return Rates(**{name: float(value) for name, value in content["rates"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save(path: Path, machine: dict[str, str], rates: Rates) -> None:
    """Keep rates; where nothing can be written the table serves the next process."""
    content = {"version": VERSION, "machine": machine, "rates": dataclasses.asdict(rates)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        log.info("%s is not kept: %s", path, error)
