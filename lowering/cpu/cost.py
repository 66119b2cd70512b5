"""What sparse attention costs on this CPU and what dense costs: where sparse stops to pay.

Two linear models of one layer, in CPU seconds, whose constants are timed once per machine and kept
in the user's cache:

    dense  = call + N^2/2 cells of every head                     torch's own attention
    sparse = call + tiles of every head + packing of K and V      the generated kernel

A tile is 64 queries x 64 keys; what is counted for a density d is d N^2/2 cells and, per query
block, half a tile of the diagonal that the causal mask wastes. Estimation is not in here: it is the
pattern's own, and small.
"""

from __future__ import annotations

import functools
import hashlib
import json
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import sympy
import torch
from mpass.lowering.cpu.attention import run_attention
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import best_instruction_set, dtype_name
from mpass.lowering.index import (
    ALL_DIAGONALS,
    BLOCK,
    AttentionMask,
    IndexWidth,
    diagonal_slots,
    empty_index,
)
from torch.nn import functional as F

from mpass.cache import cache_dir, write_whole

LENGTH, HEADS, KV_HEADS, DENSITY = sympy.symbols("N H Hk d", positive=True)
DENSE_CALL, DENSE_CELL, SPARSE_CALL, TILE, PACK = sympy.symbols("a c s t p", positive=True)

DENSE_SECONDS = DENSE_CALL + DENSE_CELL * HEADS * LENGTH**2 / 2
"""CPU seconds of dense causal attention over N tokens."""

TILES = DENSITY * LENGTH**2 / (2 * BLOCK**2) + LENGTH / (2 * BLOCK)
"""Tiles that one head computes when it selects the share d of the causal cells."""

SPARSE_SECONDS = SPARSE_CALL + TILE * HEADS * TILES + PACK * KV_HEADS * LENGTH / BLOCK
"""CPU seconds of the sparse kernel over N tokens at density d."""

MEASURED_LENGTH = 2048
"""Tokens at which the constants are timed: long enough for both rates to be flat in N."""

MEASURED_HEADS = 4
REPEATS = 5


@dataclass(frozen=True, slots=True)
class CostConstants:
    """CPU seconds, all threads together: per call, per cell of dense attention, per tile of the
    sparse kernel, and per packed block of 64 keys and values of one kv head."""

    dense_call: float
    dense_cell: float
    sparse_call: float
    tile: float
    pack: float

    def substitutions(self) -> dict[sympy.Symbol, float]:
        return {
            DENSE_CALL: self.dense_call,
            DENSE_CELL: self.dense_cell,
            SPARSE_CALL: self.sparse_call,
            TILE: self.tile,
            PACK: self.pack,
        }


@dataclass(frozen=True, slots=True)
class Prediction:
    """CPU seconds of one layer's attention, dense and sparse."""

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        return self.dense / self.sparse


def predict(
    constants: CostConstants, *, length: int, heads: int, kv_heads: int, density: float
) -> Prediction:
    """Both costs of one layer. density: share of the causal cells that are computed."""
    values = constants.substitutions() | {
        LENGTH: length,
        HEADS: heads,
        KV_HEADS: kv_heads,
        DENSITY: density,
    }
    return Prediction(float(DENSE_SECONDS.subs(values)), float(SPARSE_SECONDS.subs(values)))


def crossover_density(constants: CostConstants, *, length: int, heads: int, kv_heads: int) -> float:
    """Density up to which sparse is no slower than dense, clamped to [0, 1]."""
    (solution,) = sympy.solve(DENSE_SECONDS - SPARSE_SECONDS, DENSITY)
    if constants.tile <= 0:  # timed on a busy machine: tiles cost less than the clock could see
        cost = predict(constants, length=length, heads=heads, kv_heads=kv_heads, density=1.0)
        return 1.0 if cost.speedup >= 1 else 0.0
    values = constants.substitutions() | {LENGTH: length, HEADS: heads, KV_HEADS: kv_heads}
    return min(1.0, max(0.0, float(solution.subs(values))))


def crossover_length(
    constants: CostConstants, *, heads: int, kv_heads: int, density: float
) -> float:
    """Length from which on sparse is no slower than dense; infinity if there is none."""
    values = constants.substitutions() | {HEADS: heads, KV_HEADS: kv_heads, DENSITY: density}
    difference = sympy.Poly((DENSE_SECONDS - SPARSE_SECONDS).subs(values), LENGTH)
    if difference.LC() <= 0:
        return float("inf")
    return max([0.0, *(float(root.evalf()) for root in difference.nroots() if root.is_real)])


@functools.cache
def machine_constants(dtype: torch.dtype, head_dim: int, value_dim: int) -> CostConstants:
    """Constants of this machine: from the user's cache, or timed (under a second) and kept there.

    They hold for one CPU model, version of torch, instruction set and number of threads.
    """
    spec = KernelSpec(dtype_name(dtype), head_dim, value_dim, best_instruction_set(dtype))
    path = constants_path(spec)
    try:
        return CostConstants(**json.loads(path.read_text()))
    except (OSError, ValueError, TypeError):
        constants = measure_constants(spec, dtype)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(constants), indent=2))
        return constants


def constants_path(spec: KernelSpec) -> Path:
    """File of a spec's constants, named by all that they depend on."""
    key = (str(spec), cpu_model(), platform.node(), torch.__version__, torch.get_num_threads())
    name = hashlib.sha256(repr(key).encode()).hexdigest()[:16]
    return cache_dir() / "cpu-cost" / f"{name}.json"


def cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor()


def measure_constants(spec: KernelSpec, dtype: torch.dtype) -> CostConstants:
    """Time dense attention, the kernel over all tiles and over none, at two lengths.

    Packing is what the kernel costs when no tile is selected.
    """
    dense, full, none = timings(spec, dtype, MEASURED_LENGTH)
    dense_call, sparse_call, _ = timings(spec, dtype, 1)
    blocks = MEASURED_LENGTH // BLOCK
    tiles = MEASURED_HEADS * blocks * (blocks + 1) / 2
    return CostConstants(
        dense_call=dense_call,
        dense_cell=max(0.0, dense - dense_call) / (MEASURED_HEADS * MEASURED_LENGTH**2 / 2),
        sparse_call=sparse_call,
        tile=max(0.0, full - none) / tiles,
        pack=max(0.0, none - sparse_call) / (MEASURED_HEADS * blocks),
    )


def timings(spec: KernelSpec, dtype: torch.dtype, length: int) -> tuple[float, float, float]:
    """CPU seconds of dense attention, of the kernel on every tile, and of the kernel on none.

    The runs take turns, so that a change of the clock meets all three.
    """
    query, key = (torch.randn(1, MEASURED_HEADS, length, spec.head_dim).to(dtype) for _ in "qk")
    value = torch.randn(1, MEASURED_HEADS, length, spec.value_dim).to(dtype)
    blocks = -(-length // BLOCK)
    none = empty_index(query, blocks, IndexWidth(), diagonal_slots(MEASURED_HEADS))
    full = empty_index(query, blocks, IndexWidth(), diagonal_slots(MEASURED_HEADS))
    full.diagonal_count.fill_(ALL_DIAGONALS)
    scale = spec.head_dim**-0.5
    mask = AttentionMask()
    runs: list[Callable[[], object]] = [
        lambda: F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale),
        lambda: run_attention(spec, query, key, value, full, mask, scale=scale),
        lambda: run_attention(spec, query, key, value, none, mask, scale=scale),
    ]
    for run in runs:
        run()
    best = [float("inf")] * len(runs)
    for _ in range(REPEATS):
        for i, run in enumerate(runs):
            start = time.process_time()
            run()
            best[i] = min(best[i], time.process_time() - start)
    return best[0], best[1], best[2]
