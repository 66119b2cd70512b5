"""What a generated kernel is: `TritonKernelSpec`, and the table that picks its tile per chip.

Nothing is tuned at run time: a first prompt that waits for an autotuner is slower than any tile.
The table holds what compiles without spills, which tests/lowering/triton/compiled/test_compile.py
asserts.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Literal

from mpass.lowering.index import BLOCK

Form = Literal["lists", "diagonals", "mixed"]
Target = Literal["sm_80", "sm_90", "sm_100", "gfx942"]
Rule = Literal["top_k", "share", "mass", "row_mass"]

TARGETS: tuple[Target, ...] = ("sm_80", "sm_90", "sm_100", "gfx942")
"""Chips that kernels are compiled for; others take the tile of the nearest older one."""

SHARED_MEMORY = {"sm_80": 163 * 1024, "sm_90": 227 * 1024, "sm_100": 227 * 1024, "gfx942": 65536}
"""Bytes of shared memory that one program may use (CUDA programming guide; CDNA 3 ISA)."""

SPLITS = 32
"""Parts that estimation cuts the keys into, so that few heads still fill a GPU."""

GROUP_TILE = 128
"""Groups of queries, and of keys, that a program of antidiagonal scores multiplies at a time."""

SELECT_TILE = 128
"""Scores that a program of selection, which is one warp, reads at a time."""

INT8_TARGETS = frozenset({"sm_80"})
"""Chips that score means as 8-bit integers, which their matrix units take at twice the rate of
16-bit numbers. On an H200 the products are not what takes the time, and 16-bit ones leave room for
three programs on a multiprocessor: 9.8 ms of estimation at 128K tokens, 13.5 in 8 bits
(benchmarks/results/gpu_h200_5.json)."""

SCORE_STAGES = 3
"""Stages of the loads of `row_scores`."""

HEAD_DIMS = range(16, 257)
"""Head sizes that the attention kernel takes, of keys and of values."""


@dataclass(frozen=True, slots=True)
class Tile:
    """Keys per step of a loop, warps of a program, stages of the loads, most heads per program."""

    keys: int
    num_warps: int
    num_stages: int
    max_pack: int = 1


@dataclass(frozen=True, slots=True)
class TritonKernelSpec:
    """Everything that decides the text of one generated module.

    template: file of templates/ without its suffixes; dtype: "bf16", "fp16" or, interpreted only,
    "fp32"; tile: keys per step; pack: query heads per program; form: how heads select blocks;
    rows, pool: query rows sampled per block and keys per mean or group, of estimation; lines: query
    rows that a program of estimation takes; int8: whether means and the rows that score them are
    8-bit numbers; rule: which blocks estimation keeps, see blocks.py.jinja; biased: whether a bias
    by distance is added; the other flags say which parts of the mask and of the index exist at all.
    What varies from call to call (lengths, the
    query offset, strides, the scale) is an argument of the kernel instead.
    """

    template: str
    dtype: str = "bf16"
    head_dim: int = 0
    value_dim: int = 0
    tile: int = BLOCK
    pack: int = 1
    form: Form = "lists"
    rows: int = 0
    pool: int = 0
    lines: int = BLOCK
    int8: bool = False
    rule: Rule = "top_k"
    columns: bool = False
    causal: bool = True
    window: bool = False
    padding: bool = False
    softcap: bool = False
    sinks: bool = False
    biased: bool = False
    lse: bool = False
    num_warps: int = 4
    num_stages: int = 1
    target: Target = "sm_90"


FEATURES = ("columns", "window", "padding", "softcap", "biased")
"""Flags of a TritonKernelSpec that take registers of the attention kernel."""


def attention_tile(
    target: Target, head_dim: int, value_dim: int, features: Collection[str] = ()
) -> Tile:
    """The tile of the attention kernel: the largest that spills nothing.

    features: which of FEATURES the kernel has; each takes registers. With three stages the copies
    of a step's keys have two steps' time. Two it is where a third tile of keys and values would
    leave room for fewer programs on a multiprocessor: sm_89 and sm_120, which take sm_80's tile,
    have 100 KB of shared memory.
    """
    dim, few = max(head_dim, value_dim), len(features) + ("biased" in features)
    stages = 3 if target in ("sm_90", "sm_100") else 2
    if dim <= 64:
        return Tile(64, 4, stages, max_pack=2)
    if target == "sm_80":
        return Tile(32, 4, stages) if dim <= 128 else Tile(32, 8, stages)
    if target == "gfx942" and dim > 128:
        return Tile(32, 4, stages)
    if dim <= 128:
        # Columns under a window also copy their positions, for which a third stage has no room.
        crowded = dim > 96 and few == 2 and "columns" in features and "window" in features
        return Tile(64 if few < 3 else 32, 4, 2 if crowded else stages, max_pack=2)
    most = 2 if dim <= 192 else 0
    return Tile(64 if few <= most else 32, 8, stages)


def gradient_tile(target: Target, template: str, head_dim: int, value_dim: int) -> Tile:
    """The tile of a kernel of the backward pass: keys per step, or queries where it is of keys.

    template: "query_gradients", "column_gradients" or "key_gradients". The tile is the largest that
    spills nothing inside of a loop. Eight warps exchange weights through shared memory between the
    products, four do not.
    """
    dim = max(head_dim, value_dim)
    if target == "gfx942":
        return Tile(32, 4 if dim <= 128 else 8, 1)
    if dim <= 64:
        return Tile(64, 4, 2)
    if dim > 128:
        return Tile(32, 8, 2)
    if template == "query_gradients":
        return Tile(64, 4, 2)
    return Tile(64, 8, 2) if target == "sm_80" else Tile(32, 4, 3)


def pack_warps(tile: Tile, pack: int) -> int:
    """Warps of a program that takes `pack` query heads: one warp group per 64 rows."""
    return min(8, tile.num_warps * pack)


def query_heads_per_program(head_slots: tuple[int, ...], group: int, limit: int) -> int:
    """The largest pack of adjacent heads of a kv head that always share one row of the index."""
    pack = limit
    while pack > 1:
        packs = [head_slots[i : i + pack] for i in range(0, len(head_slots), pack)]
        if group % pack == 0 and all(len(set(slots)) == 1 for slots in packs):
            return pack
        pack //= 2
    return 1


def score_warps(head_dim: int) -> int:
    """Warps of a program of estimation that multiplies 64 query rows with 64 keys or means."""
    return 4 if head_dim <= 128 else 8


def row_score_warps(head_dim: int, biased: bool) -> int:
    """The same of `row_scores`, where the places of a bias by distance take registers."""
    return 8 if biased and head_dim > 64 else score_warps(head_dim)


def score_lines(int8: bool) -> int:
    """Query rows that a program of `row_scores` takes together."""
    return BLOCK


def score_programs(spec: TritonKernelSpec) -> int:
    """Programs of `row_scores` that a multiprocessor is given.

    No more than it holds at a time (tests/lowering/triton/compiled/test_compile.py): those
    that had to wait would begin when the others, which share all work evenly, end.
    """
    if spec.target == "gfx942" or spec.num_warps > 4:
        return 1
    return 2 if spec.target == "sm_80" or spec.int8 else 3


def int8_dim(head_dim: int) -> int:
    """Numbers of a row of 8-bit means in memory, zeros behind the head's: 32 multiply at a time."""
    return max(32, power_of_two(head_dim))


def parts(dim: int, target: Target) -> list[tuple[int, int]]:
    """A dimension as the powers of two that tiles are made of, largest first: (start, width) each.

    96 -> (0, 64), (64, 32). More than two parts cost more registers than the padding that they
    save, and so do two of them beyond 128 on sm_80: then one part is padded, its loads masked.
    """
    rest = (dim + 15) // 16 * 16
    cut, start = [], 0
    while rest:
        width = 1 << (rest.bit_length() - 1)
        cut.append((start, width))
        start += width
        rest -= width
    whole = len(cut) > 2 or (dim > 128 and target == "sm_80")
    return [(0, power_of_two(dim))] if whole else cut


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << max(0, size - 1).bit_length()


def target_of(device_name: str) -> Target:
    """The entry of the table for a chip: `sm_89` takes sm_80's, `sm_120` takes sm_80's too.

    device_name: `sm_<capability>` or `gfx<version>`. Consumer Blackwell (sm_120) has the shared
    memory and the matrix instructions of the sm_80 line, not those of sm_100.
    """
    if device_name.startswith("gfx"):
        return "gfx942"
    capability = int(device_name.removeprefix("sm_"))
    if 90 <= capability < 100:
        return "sm_90"
    return "sm_100" if 100 <= capability < 120 else "sm_80"
