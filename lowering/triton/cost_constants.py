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
from collections.abc import Callable
from pathlib import Path

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn import functional as F

from mpass.files import cache_dir, write_whole
from mpass.lowering.index import AttentionMask, IndexWidth, diagonal_slots, whole_index
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.chips import Chip

log = logging.getLogger(__name__)

VERSION = 1
"""Of the measurement and of the file; files of another version are replaced."""

REMEASURE = "MPASS_REMEASURE"

LENGTHS = (4096, 16384)
"""Tokens at which both attentions are timed: two of them give a rate and where it is halved."""

HEADS, KV_HEADS, HEAD_DIM = 32, 8, 128
"""Of the attention that is timed: those of the table's rates."""

REPEATS = 5

LEAST_SHARE = 0.02
"""Of the chip's peak rate, below which a timing is not believed; and above it none is."""


@dataclasses.dataclass(frozen=True, slots=True)
class Rates:
    """TFLOP/s on long prompts, and the tokens at which half of that is reached, as of `Chip`."""

    dense: float
    dense_half: float
    sparse: float
    sparse_half: float


def measured_chip(chip: Chip, device: torch.device) -> Chip:
    """The chip with the rates that were measured on this machine; as it is where none were."""
    machine = describe_machine(device)
    path = rates_path(machine)
    if os.environ.get(REMEASURE, "0") not in ("", "0"):
        found = measure(device)
        if found is None or not plausible(found, chip):
            log.warning("the rates of %s were not measured (%s)", machine["device"], found)
            return chip
        save(path, machine, found)
    kept = load(path, machine)
    if kept is None or not plausible(kept, chip):
        return chip
    on = f"this machine, torch {machine['torch']}, triton {machine['triton']}"
    return dataclasses.replace(chip, measured=on, **dataclasses.asdict(kept))


def fit(seconds: tuple[float, float]) -> tuple[float, float]:
    """A rate in TFLOP/s and the tokens at which half of it is reached, from two timings.

    seconds: of causal attention over `LENGTHS`. Rate r and half length h make a time of
    flops * (1 + h / N) / r.
    """
    works = [2.0 * HEADS * length**2 * HEAD_DIM / 1e12 for length in LENGTHS]
    slow, fast = (work / spent for work, spent in zip(works, seconds, strict=True))
    (n1, n2), (x, y) = LENGTHS, (1 / slow, 1 / fast)
    # 1 / rate(N) = 1 / r + (h / r) / N: a line in 1 / N.
    slope = max(0.0, (x - y) / (1 / n1 - 1 / n2))
    rest = y - slope / n2
    return 1 / rest, slope / rest


def plausible(rates: Rates, chip: Chip) -> bool:
    """Whether a chip can have such rates."""
    low, high = LEAST_SHARE * chip.teraflops, 1.1 * chip.teraflops
    halves = (rates.dense_half, rates.sparse_half)
    fast = all(low < rate < high for rate in (rates.dense, rates.sparse))
    return fast and all(0 <= half < 1e5 for half in halves)


def measure(device: torch.device) -> Rates | None:
    """Time both attentions on a GPU; None where that cannot be done now."""
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return None
    from mpass.lowering.triton.attention import sparse_attention  # its launchers load Triton

    spent: dict[str, list[float]] = {"dense": [], "sparse": []}
    with unset_fake_temporarily(), torch.no_grad():
        for length in LENGTHS:
            generator = torch.Generator(device).manual_seed(0)  # the user's own stays as it is
            query, key = (
                torch.randn(
                    1, heads, length, HEAD_DIM, device=device, generator=generator
                ).bfloat16()
                for heads in (HEADS, KV_HEADS)
            )
            index = whole_index(query, -(-length // 64), IndexWidth(), diagonal_slots(HEADS))
            inputs = AttentionInputs(query, key, key, AttentionMask(), HEAD_DIM**-0.5)

            causal = {"is_causal": True, "enable_gqa": True}
            dense = functools.partial(
                F.scaled_dot_product_attention,
                query,
                key,
                key,
                **causal,  # type: ignore[arg-type]
            )
            spent["dense"].append(time_on(dense))
            sparse = functools.partial(sparse_attention, inputs, index)
            spent["sparse"].append(time_on(sparse))
    dense_rate, sparse_rate = (fit((a, b)) for a, b in spent.values())
    return Rates(*dense_rate, *sparse_rate)


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
