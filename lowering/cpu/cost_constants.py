"""The constants of the cost model: timed once per machine, checked, and kept in the user's cache.

A busy machine must not decide for years which kernel runs. So every figure is the least of several
short runs that take turns on one thread, in CPU time of that thread alone (other processes and
other threads of this one do not count); what comes out must lie within what processors can do, else
it is timed again, and after `ATTEMPTS` the documented defaults serve this process. What is kept
says for which machine and by which version of the measurement; anything else is replaced.

`MPASS_REMEASURE=1` in the environment times anew whatever is asked for and replaces what was kept.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.files import cache_dir, write_whole
from mpass.lowering.cpu.attention import run_attention
from mpass.lowering.cpu.cost_model import (
    CELLS,
    LENGTH,
    CostConstants,
    EstimatorConstants,
    LinearConstants,
)
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import (
    attention_spec,
    best_instruction_set,
    dtype_name,
)
from mpass.lowering.index import (
    ALL_DIAGONALS,
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
)
from mpass.lowering.inputs import AttentionInputs

log = logging.getLogger(__name__)

T = TypeVar("T", CostConstants, EstimatorConstants, LinearConstants)

VERSION = 7
"""Of the measurement and of the file; files of another version are replaced."""

REMEASURE = "MPASS_REMEASURE"

MEASURED_LENGTH = 1024
"""Tokens at which the rates are timed: long enough for both to be flat in N."""

ESTIMATOR_LENGTHS = (BLOCK, 2048, 8192)
"""Tokens at which an estimator is timed: one length per term of its model, and long enough for its
operands to have left the nearest caches, or 32K tokens would be predicted a half too dear."""

MEASURED_HEADS = 4
REPEATS = 5
SHORTEST_TURN, MOST_TURNS = 2e-3, 20
"""Runs that are over at once are repeated for this many seconds, or this many times, per turn."""

ATTEMPTS = 2

GIGAFLOPS = (0.2, 4000.0)
"""What one thread does in attention per second: from an old laptop to twice today's AMX."""

RATES = (0.05, 4.0)
"""Seconds of a tile over seconds of dense attention on as many cells: 0.3 to 1.2 so far."""

LONGEST_CALL = 5e-3
"""Seconds that a call on one token may take; 20 to 200 us so far."""

DEFAULT_GIGAFLOPS = {"amx": 400.0, "avx512_bf16": 70.0, "avx512": 60.0, "avx2": 30.0}
"""Of one thread in dense attention, where timing fails; tiles are then taken to be as fast."""

DEFAULT_CALL = 5e-5


@functools.cache
def machine_constants(
    dtype: torch.dtype, head_dim: int, value_dim: int, int8: bool = False
) -> CostConstants:
    """Constants of this machine: from the user's cache, or timed (under a second) and kept there.

    They hold for one CPU model, version of torch and instruction set. int8: of the sparse kernel
    whose scores are products of 8-bit numbers, where there is one.
    """
    spec = attention_spec(dtype, head_dim, value_dim, int8=int8)
    found = kept_or_measured(
        str(spec),
        lambda numbers: CostConstants(**numbers),
        lambda: measure_constants(spec, dtype),
        lambda constants: implausible(constants, spec),
    )
    return found or default_constants(spec)


def kept_or_measured(
    subject: str,
    read: Callable[[dict[str, float]], T],
    measure: Callable[[], T],
    fault: Callable[[T], str],
) -> T | None:
    """What the cache holds about a subject, else what is measured now; None if nothing plausible.

    fault: what is wrong with some constants, in words, or the empty string.
    """
    machine = describe_machine(subject)
    path = constants_path(machine)
    if os.environ.get(REMEASURE, "0") in ("", "0"):
        kept = load_constants(path, machine, read)
        if kept is not None and not fault(kept):
            return kept
    reason = ""
    for _ in range(ATTEMPTS):
        found = measure()
        reason = fault(found)
        if not reason:
            save_constants(path, machine, asdict(found))
            return found
    log.warning("the cost of %s was not measured (%s): defaults serve", subject, reason)
    return None


def describe_machine(subject: str) -> dict[str, str]:
    """All that constants depend on."""
    return {
        "subject": subject,
        "cpu": cpu_model(),
        "host": platform.node(),
        "torch": str(torch.__version__),
    }


def constants_path(machine: dict[str, str]) -> Path:
    """File of some constants, named by all that they depend on."""
    name = hashlib.sha256(repr(sorted(machine.items())).encode()).hexdigest()[:16]
    return cache_dir() / "cpu-cost" / f"{name}.json"


def load_constants(
    path: Path, machine: dict[str, str], read: Callable[[dict[str, float]], T]
) -> T | None:
    """The constants of a file, or None if it is not there, broken, old or of another machine."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != VERSION or content["machine"] != machine:
            return None
        return read({name: float(value) for name, value in content["constants"].items()})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def save_constants(path: Path, machine: dict[str, str], constants: dict[str, float]) -> None:
    """Keep constants; where nothing can be written they are timed again by the next process."""
    content = {"version": VERSION, "machine": machine, "constants": constants}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(content, indent=2) + "\n")
    except OSError as error:
        log.info("%s is not kept: %s", path, error)


@functools.cache
def cpu_model() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def default_constants(spec: KernelSpec) -> CostConstants:
    """What serves where timing fails: dense and tiles at one rate, so that density decides."""
    cell = 2 * (spec.head_dim + spec.value_dim) / (DEFAULT_GIGAFLOPS[spec.instruction_set] * 1e9)
    tile = cell * BLOCK**2
    return CostConstants(DEFAULT_CALL, cell, 2 * DEFAULT_CALL, tile / 4, tile, tile, tile / 4)


def implausible(constants: CostConstants, spec: KernelSpec) -> str:
    """What no machine could have measured, in words, or the empty string."""
    if not all(0 <= value < float("inf") for value in asdict(constants).values()):
        return f"{constants} is no set of times"
    for call in (constants.dense_call, constants.sparse_call):
        if not 0 < call < LONGEST_CALL:
            return f"a call takes {call} s"
    flops = 2 * (spec.head_dim + spec.value_dim)
    low, high = GIGAFLOPS
    if not low < flops / max(constants.dense_cell, 1e-30) / 1e9 < high:
        return f"dense attention takes {constants.dense_cell} s per cell"
    low, high = RATES
    for name, seconds in (("tile", constants.tile), ("tile of columns", constants.column)):
        ratio = seconds / (constants.dense_cell * BLOCK**2)
        if not low < ratio < high:
            return f"a {name} takes {ratio:.3g} times as long as dense attention on its cells"
    for name, seconds in (("packing a block", constants.pack), ("a row", constants.row)):
        if seconds > 4 * constants.tile:
            return f"{name} takes {seconds} s, a tile {constants.tile} s"
    return ""


def measure_constants(spec: KernelSpec, dtype: torch.dtype) -> CostConstants:
    """Time dense attention and the kernel over all tiles, over columns and over no tile at all.

    The last with a kv head per query head and with one for all: the difference is packing.
    """
    with one_thread():
        dense, full, none, shared, columns = timings(spec, dtype, MEASURED_LENGTH)
        dense_call, sparse_call, *_ = timings(spec, dtype, 1)
    blocks = MEASURED_LENGTH // BLOCK
    cells = MEASURED_HEADS * float(CELLS.subs(LENGTH, MEASURED_LENGTH))
    tiles = MEASURED_HEADS * blocks * (blocks + 1) / 2
    # A block of queries sees the columns in blocks before its own, here those of the first half.
    gathered = MEASURED_HEADS * sum(min(i, blocks // 2) for i in range(blocks))
    pack = max(0.0, none - shared) / ((MEASURED_HEADS - 1) * blocks)
    return CostConstants(
        dense_call=dense_call,
        dense_cell=max(0.0, dense - dense_call) / cells,
        sparse_call=sparse_call,
        row=max(0.0, (none - sparse_call) / (MEASURED_HEADS * blocks) - pack),
        tile=max(0.0, full - none) / tiles,
        column=max(0.0, columns - none) / gathered,
        pack=pack,
    )


def timings(spec: KernelSpec, dtype: torch.dtype, length: int) -> list[float]:
    """CPU seconds of dense attention and of the kernel on every tile, none, none with one kv head,
    and on columns."""
    generator = torch.Generator("cpu").manual_seed(0)  # the user's own stays as it is
    query, key, value = (
        torch.randn(1, MEASURED_HEADS, length, dim, device="cpu", generator=generator).to(dtype)
        for dim in (spec.head_dim, spec.head_dim, spec.value_dim)
    )
    blocks, slots = -(-length // BLOCK), diagonal_slots(MEASURED_HEADS)
    none = empty_index(query, blocks, IndexWidth(), slots)
    full = empty_index(query, blocks, IndexWidth(), slots)
    full.diagonal_count.fill_(ALL_DIAGONALS)
    columns = empty_index(query, blocks, IndexWidth(max_columns=max(1, length // 2)), slots)
    columns.column_count.fill_(length // 2)
    columns.column_index.copy_(torch.arange(max(1, length // 2), device="cpu"))
    scale, mask = spec.head_dim**-0.5, AttentionMask()

    def sparse(index: SparseIndex, kv_heads: int = MEASURED_HEADS) -> Tensor:
        keys, values = key[:, :kv_heads], value[:, :kv_heads]
        inputs = AttentionInputs(query, keys, values, mask, scale, int8=spec.int8)
        return run_attention(spec, inputs, index)

    return least_seconds(
        [
            lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale),
            lambda: sparse(full),
            lambda: sparse(none),
            lambda: sparse(none, kv_heads=1),
            lambda: sparse(columns),
        ]
    )


def estimator_constants(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    group: int,
    estimate: Callable[[Tensor, Tensor], object],
) -> EstimatorConstants:
    """What an estimator costs per head, from the cache or timed; infinite if it cannot be timed.

    name: of the pattern with its parameters; group: query heads per kv head; estimate: runs it on
    query [1, group, N, D] and key [1, 1, N, D].
    """

    def measure() -> EstimatorConstants:
        generator = torch.Generator("cpu").manual_seed(0)
        runs: list[Callable[[], object]] = []
        for length in ESTIMATOR_LENGTHS:
            query, key = (
                torch.randn(1, heads, length, head_dim, device="cpu", generator=generator).to(dtype)
                for heads in (group, 1)
            )
            runs.append(functools.partial(estimate, query, key))
        with one_thread():
            return EstimatorConstants.fit(ESTIMATOR_LENGTHS, least_seconds(runs), group)

    subject = f"{name}, {group} heads, {dtype_name(dtype)}, D={head_dim}, "
    found = kept_or_measured(
        subject + best_instruction_set(dtype),
        lambda numbers: EstimatorConstants(**numbers),
        measure,
        lambda constants: "" if constants.call < 1 else "a call takes a second",
    )
    return found or EstimatorConstants(float("inf"), 0.0, 0.0)


def least_seconds(runs: Sequence[Callable[[], object]], repeats: int = REPEATS) -> list[float]:
    """The least CPU time of this thread per run; they take turns: all meet the same clock."""
    turns = []
    for run in runs:
        run()
        start = time.thread_time()
        run()
        elapsed = time.thread_time() - start
        turns.append(max(1, min(MOST_TURNS, int(SHORTEST_TURN / max(elapsed, 1e-9)))))
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            for _ in range(turns[i]):
                start = time.thread_time()
                run()
                best[i] = min(best[i], time.thread_time() - start)
    return best


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep work on the calling thread, which is the one whose clock is read.

    torch's own function is called where it is defined: vLLM puts one that does nothing under the
    public name, since it has bound the threads to cores. That binding stays as it is.
    """
    before = torch.get_num_threads()
    torch._C.set_num_threads(1)
    try:
        with torch.no_grad():
            yield
    finally:
        torch._C.set_num_threads(before)
