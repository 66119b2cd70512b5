"""What the estimators cost on a GPU, step by step: bytes, products, issue slots and launches.

Cycles, slots and serial seconds are fitted to the times of single kernels on an H200 (head_dim 128,
bf16, benchmarks/results/gpu_h200_3.json), bytes and launches are read off the launchers beside
this file. One function per estimator, by its record's name. Letters: H
query heads that the estimator works for, Hk their kv heads, Nq queries, Nk keys, I query blocks,
J key blocks, D head_dim.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from mpass.lowering.index import BLOCK
from mpass.lowering.triton.chips import Chip
from mpass.lowering.triton.list_blocks import SCORE_BYTES
from mpass.lowering.triton.spec import INT8_TARGETS, power_of_two

BANDWIDTH = 0.9
"""Share of a chip's bandwidth that kernels reach which only move bytes."""

ISSUE = 0.85
"""Share of the issue slots that kernels fill which are bound by them."""

RUNS = 0.12
"""Share of the bandwidth at which means over short runs of keys are made."""

TOPK = 5e-5
"""Seconds of torch.topk over few keys: it is a row of small kernels."""

SERIAL = 1e-6
"""Seconds per 1024 keys of a program that walks all keys of a head alone, times these factors."""
LIST_COLUMNS, MARK_DISTANCES, LIST_DIAGONALS = 1.45, 2.6, 2.9

LIST_SLOTS = ((128, 1.1e3), (512, 2.0e3), (2048, 5.8e3), (16384, 8.0e4))
"""Issue slots that listing the best blocks of one query block takes, by the blocks it chooses from
(templates/blocks.py.jinja)."""


@dataclass(frozen=True, slots=True)
class Shape:
    """One attention that is run.

    heads, kv_heads: the batch counts; length means both where queries and keys are as many.
    """

    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    queries: int
    keys: int
    causal: bool = True

    @property
    def query_blocks(self) -> int:
        return -(-self.queries // BLOCK)

    @property
    def key_blocks(self) -> int:
        return -(-self.keys // BLOCK)

    @property
    def blocks(self) -> float:
        """Pairs of a query block and a key block that the mask leaves, of one head."""
        rows, all_keys = self.query_blocks, self.key_blocks
        if not self.causal:
            return float(rows * all_keys)
        return rows * (all_keys - rows) + rows * (rows + 1) / 2

    @property
    def key_bytes(self) -> float:
        """Of all keys, in 16 bits."""
        return 2.0 * self.kv_heads * self.keys * self.head_dim


@dataclass(frozen=True, slots=True)
class Step:
    """One step of an op: seconds on the device; generated kernels and torch ops to launch."""

    name: str
    seconds: float
    launches: int = 0
    ops: int = 0


def run(
    chip: Chip,
    name: str,
    *,
    moved: float = 0.0,
    cycles: float = 0.0,
    slots: float = 0.0,
    serial: float = 0.0,
    turns: int = 1,
    launches: int = 1,
    ops: int = 0,
) -> Step:
    """A step from its work: whatever bounds it, and what its kernels take at least.

    moved: bytes; cycles: of multiprocessors; slots: of instructions, four a cycle; serial: seconds
    that a single program takes; turns: how often everything is launched.
    """
    bound = max(
        moved / (chip.terabytes * 1e12 * BANDWIDTH),
        cycles / chip.cycles / ISSUE,
        slots / (4 * chip.cycles) / ISSUE,
        serial,
    )
    kernels = turns * (launches + ops)
    return Step(name, bound + kernels * chip.kernel * 1e-6, turns * launches, turns * ops)


def by_dim(cycles: float, head_dim: int) -> float:
    """Cycles of a tile whose products shrink with head_dim while its softmax does not."""
    return cycles * (0.5 + head_dim / 256)


def list_slots(candidates: float) -> float:
    """`LIST_SLOTS` at any number of blocks."""
    width = max(LIST_SLOTS[0][0], power_of_two(math.ceil(candidates)))
    place = min(bisect.bisect_left([c for c, _ in LIST_SLOTS], width), len(LIST_SLOTS) - 1)
    low, high = LIST_SLOTS[max(0, place - 1)], LIST_SLOTS[max(1, place)]
    power = math.log(high[1] / low[1]) / math.log(high[0] / low[0])
    return float(low[1] * (width / low[0]) ** power)


def chunks(score_bytes: float) -> int:
    """Launches that scores are made in, so that they fit."""
    return max(1, math.ceil(score_bytes / SCORE_BYTES))


def last_queries(chip: Chip, shape: Shape, *, diagonals: bool) -> Iterator[Step]:
    """Columns, and diagonals if asked for, by the attention of the last queries."""
    heads, keys = shape.heads, shape.keys
    tiles = heads * shape.key_blocks
    statistics, sums = by_dim(940, shape.head_dim), by_dim(2680, shape.head_dim)
    yield run(chip, "row_statistics", moved=shape.key_bytes, cycles=ISSUE * tiles * statistics)
    written = 12.0 * heads * keys
    yield run(
        chip, "sum_probabilities", moved=shape.key_bytes + written, cycles=ISSUE * tiles * sums
    )
    yield run(chip, "sums", moved=2 * written, launches=0, ops=2)
    for name in ("columns", "diagonals") if diagonals else ("columns",):
        moved = 60.0 * heads * keys
        yield run(chip, f"topk of {name}", moved=moved, serial=TOPK, launches=0, ops=4)
    thousands = math.ceil(keys / 1024)
    yield run(chip, "list_columns", serial=LIST_COLUMNS * SERIAL * thousands)
    if diagonals:
        yield run(chip, "mark_distances", serial=MARK_DISTANCES * SERIAL * thousands)
        turns = math.ceil((shape.key_blocks + 1) / 64)
        yield run(chip, "list_diagonals", serial=LIST_DIAGONALS * SERIAL * turns)


def vertical_slash(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    yield run(chip, "buffers", launches=0, ops=1)
    yield from last_queries(chip, shape, diagonals=True)


def list_step(chip: Chip, shape: Shape, candidates: float, max_blocks: int, turns: int) -> Step:
    """The best of the blocks of every query block, into lists that are zeroed before."""
    rows = shape.heads * shape.query_blocks
    return run(
        chip,
        "list_blocks",
        moved=rows * (4.0 * max_blocks + 4.0 * candidates / 2),
        slots=rows * list_slots(candidates),
        turns=turns,
    )


def vertical_block(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    heads, dim = shape.heads, shape.head_dim
    yield run(chip, "buffers", launches=0, ops=1)
    if chip.target in INT8_TARGETS:
        yield run(chip, "find_centre")
    yield run(chip, "pool_runs", moved=1.125 * shape.key_bytes / RUNS)
    scores = 4.0 * heads * shape.query_blocks * shape.key_blocks
    turns = chunks(scores)
    tiles = heads * shape.blocks * (rule.rows / BLOCK) / rule.pool
    yield run(
        chip, "score_rows", moved=scores / 2, cycles=tiles * by_dim(690, dim), turns=turns, ops=1
    )
    yield list_step(chip, shape, shape.key_blocks, rule.max_blocks, turns)
    if rule.columns:
        yield from last_queries(chip, shape, diagonals=False)


def block_scores(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    means = shape.keys / rule.block_size
    yield run(chip, "buffers", launches=0, ops=2)
    yield run(chip, "pool_runs", moved=2 * shape.key_bytes)
    scores = 4.0 * shape.heads * shape.query_blocks * means
    turns = chunks(scores)
    tiles = shape.heads * shape.blocks / rule.block_size
    cycles = tiles * by_dim(1900, shape.head_dim)
    yield run(chip, "score_tiles", moved=scores / 2, cycles=cycles, turns=turns, ops=1)
    yield list_step(chip, shape, means, rule.max_blocks, turns)


def block_sparse(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    yield run(chip, "buffers", launches=0, ops=2)
    queries = 2.0 * shape.heads * shape.queries * shape.head_dim
    yield run(chip, "means", moved=2.6 * (queries + shape.key_bytes), launches=2)
    blocks = (shape.queries / rule.block_size) * (shape.keys / rule.block_size)
    product = 2.0 * shape.heads * blocks * shape.head_dim / (chip.products * 1e12)
    scores = 4.0 * shape.heads * blocks
    turns = chunks(scores)
    yield run(chip, "product", moved=2.5 * scores, turns=turns, serial=product)
    yield list_step(chip, shape, shape.keys / rule.block_size, rule.top_k, turns)


def x_attention(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    yield run(chip, "buffers", launches=0, ops=2)
    groups = shape.queries / rule.stride
    cells = BLOCK * BLOCK * shape.blocks
    flops = 2.0 * shape.heads * cells / rule.stride * shape.head_dim
    scores = 4.0 * shape.heads * groups * shape.key_blocks
    turns = chunks(scores)
    seconds = flops / (0.7 * chip.sparse * 1e12)
    yield run(chip, "score_groups", serial=seconds, turns=turns, ops=1)
    yield run(chip, "sum_groups", moved=1.5 * scores, turns=turns)
    yield list_step(chip, shape, shape.key_blocks, rule.max_blocks, turns)


def flex_prefill(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    size, heads = rule.block_size, shape.heads
    scores = 4.0 * heads * size * shape.keys
    turns = chunks(2 * scores)
    product = 2.0 * heads * size * shape.keys * shape.head_dim / (chip.products * 1e12)
    moved = 80 * scores + 4 * shape.key_bytes * heads / shape.kv_heads
    yield run(chip, "attention", moved=moved, serial=product, turns=turns, launches=0, ops=120)
    pooled = 4.0 * heads * (shape.queries / size) * (shape.keys / size)
    yield run(chip, "pooled and sorted", moved=500 * pooled, launches=0, ops=66)
    yield list_step(chip, shape, shape.keys / size, rule.max_blocks, chunks(pooled))


def sample_attention(chip: Chip, shape: Shape, rule: Any) -> Iterator[Step]:
    yield run(chip, "rows", launches=0, ops=20)
    tiles = shape.heads * shape.blocks * rule.row_share
    for name, cycles in (("row_totals", 850), ("sum_columns", 890)):
        yield run(chip, name, cycles=tiles * by_dim(cycles, shape.head_dim))
    yield run(chip, "sort", moved=1000.0 * shape.heads * shape.keys, launches=0, ops=27)


COSTS: dict[str, Callable[[Chip, Shape, Any], Iterator[Step]]] = {
    "block_scores": block_scores,
    "block_sparse": block_sparse,
    "flex_prefill": flex_prefill,
    "sample_attention": sample_attention,
    "vertical_block": vertical_block,
    "vertical_slash": vertical_slash,
    "x_attention": x_attention,
}


def columns_of(rule: Any) -> int:
    """Vertical columns that the index has room for per head."""
    for name in ("vertical_size", "columns", "max_columns", "sink_size"):
        if hasattr(rule, name):
            return int(getattr(rule, name))
    return 0


def listed_blocks_of(rule: Any) -> int:
    """Entries that the index has room for: per query block, or of a head's diagonals."""
    for name in ("max_blocks", "top_k", "slash_size"):
        if hasattr(rule, name):
            return int(getattr(rule, name))
    return 256
