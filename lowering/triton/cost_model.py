"""What an attention costs on a GPU, sparse and dense: a roofline, in seconds.

    dense  = products / rate of the best dense attention
    sparse = estimation + plan and gathering of columns + products left / rate of our kernel

Each part is bound by what takes longest on the chip (bytes, products, issue slots, a program that
walks the keys alone), and each kernel takes a few microseconds whatever it does. The host launches
an op's kernels in a millisecond or two, and may hide that behind other work or not: it is taken not
to. Everything here is a pure function of a chip (chips.py); nothing asks for a device.

What is predicted is written as predicted wherever it is shown (docs/gpu.md).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpass.lowering.crossover import LayerWork
from mpass.lowering.index import BLOCK
from mpass.lowering.triton.chips import Chip
from mpass.lowering.triton.estimator_costs import (
    COSTS,
    Shape,
    Step,
    columns_of,
    listed_blocks_of,
    run,
)

DISPATCH = 5e-4
"""Seconds of the host for the two ops of a layer beside what they launch: calls that ran dense took
0.65 ms where Inductor's own call took 0.11 (an H200's host, 8192 tokens)."""

DENSE_CALL = 3e-5
"""Seconds of a call of dense attention, however short."""

BISECTIONS = 12
"""Steps in which a break-even share is found: to a quarter of a thousandth."""

STATIC_OPS = 30
"""Torch ops that make the index of a pattern whose parameters say all."""

MERGE_OPS = 6
"""Torch ops that take query rows in turn from the heads of a kv head, and give them its columns."""

JOIN_OPS = 12
"""Torch ops that join the indexes of two patterns of a layer."""

ROW_BLOCKS = 3.0
"""Key blocks of a query block at which our kernel reaches half of its rate: its fixed work."""

PACKED = 1.1
"""Rate of the attention kernel that takes two heads of one index at a time, over that for one."""


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds of one layer's attention on the device, and of the host that launches it.

    density: share of the dense work that is computed; estimate, plan, attention: the parts of the
    sparse op; dense: the dense one; steps: what estimation consists of.
    """

    density: float
    dense: float
    estimate: float
    plan: float
    attention: float
    host: float
    steps: tuple[Step, ...] = ()

    @property
    def sparse(self) -> float:
        """Seconds until the sparse op is over, the device idle when it begins.

        The attention is launched last, so that the host's part cannot hide behind it.
        """
        device = self.estimate + self.plan + self.attention
        return max(device, self.host + self.attention) if self.host else device

    @property
    def speedup(self) -> float:
        """Of sparse over dense attention."""
        return self.dense / self.sparse


def predict(
    chip: Chip,
    work: LayerWork,
    *,
    keys: int,
    queries: int | None = None,
    batch: int = 1,
    density: float | None = None,
    shared_index: bool = False,
) -> Prediction:
    """What an attention costs at given lengths.

    queries: the last ones of the keys; all by default. density: share of the dense work that is
    selected, what the patterns expect by default. shared_index: as if the heads of a kv head had
    one index between them.
    """
    queries = keys if queries is None else queries
    shape = Shape(
        batch * work.heads,
        batch * work.kv_heads,
        work.head_dim,
        work.value_dim,
        queries,
        keys,
        work.causal,
    )
    share = expected_share(work, keys) if density is None else density
    steps = tuple(estimate_steps(chip, work, shape, batch, shared_index))
    plan = tuple(plan_steps(chip, work, shape))
    packed = shared_index or all(part.per_kv_head for part in work.patterns)
    attention = attention_seconds(chip, shape, share, packed=packed)
    launched = [*steps, *plan]
    launches = 1 + sum(step.launches for step in launched)
    ops = sum(step.ops for step in launched)
    return Prediction(
        density=share,
        dense=max(DENSE_CALL, dense_seconds(chip, shape)),
        estimate=sum(step.seconds for step in steps),
        plan=sum(step.seconds for step in plan),
        attention=attention,
        host=0.0 if work.replayed else DISPATCH + (launches * chip.launch + ops * chip.op) * 1e-6,
        steps=steps,
    )


def products(shape: Shape) -> float:
    """Floating-point operations of dense attention over the blocks that the mask leaves."""
    cells = shape.blocks * BLOCK * BLOCK
    return 2.0 * shape.heads * cells * (shape.head_dim + shape.value_dim)


def narrow(shape: Shape) -> float:
    """The share of a rate that is left at small head sizes, whose softmax counts for more."""
    return min(1.0, 0.5 + (shape.head_dim + shape.value_dim) / 512)


def dense_seconds(chip: Chip, shape: Shape) -> float:
    """Of the best dense attention."""
    cells = float(shape.queries * shape.keys)
    if shape.causal:
        cells -= shape.queries**2 / 2
    flops = 2.0 * shape.heads * cells * (shape.head_dim + shape.value_dim)
    length = math.sqrt(shape.queries * shape.keys)
    return flops / (chip.dense_rate(length) * 1e12 * narrow(shape))


def attention_seconds(chip: Chip, shape: Shape, share: float, *, packed: bool = False) -> float:
    """Of our kernel over a share of the blocks that the mask leaves."""
    most = chip.sparse * (PACKED if packed else 1.0)
    row = share * shape.blocks / max(1, shape.query_blocks)
    rate = most * 1e12 * narrow(shape) * row / (row + ROW_BLOCKS)
    moved = 2.0 * (shape.heads * shape.queries * 2 + 2 * shape.kv_heads * shape.keys)
    bytes_bound = moved * shape.head_dim / (chip.terabytes * 1e12)
    return max(share * products(shape) / rate, bytes_bound) + chip.kernel * 1e-6


def expected_share(work: LayerWork, keys: int, denser: float = 1.0) -> float:
    """The share of the dense work that the patterns of a layer are expected to select.

    denser: how much more the prompt may want of those whose density depends on it.
    """
    whole = keys / 2 if work.causal else float(keys)
    reach = work.window if work.causal else 2 * work.window  # a window ahead is one more
    seen = min(reach + BLOCK, keys) if work.window else keys
    cells = seen - seen**2 / (2 * keys) if work.causal else float(seen)
    inside = sum(
        part.heads * part.density(seen) * (1.0 if part.exact else denser) for part in work.patterns
    )
    inside = min(1.0, inside / work.heads)
    return min(1.0, inside * cells / whole)


def estimate_steps(
    chip: Chip, work: LayerWork, shape: Shape, batch: int, shared_index: bool
) -> Iterator[Step]:
    """Of every pattern of the layer, one after the other."""
    for part in work.patterns:
        heads = batch * part.heads
        kv_heads = max(1, shape.kv_heads * part.heads // work.heads)
        together = shared_index or part.per_kv_head
        own = replace(shape, heads=kv_heads if together else heads, kv_heads=kv_heads)
        if together:
            moved = 4.0 * kv_heads * shape.queries * shape.head_dim
            yield run(chip, "merge_heads", moved=moved, launches=0, ops=MERGE_OPS)
        if part.estimator in COSTS:
            yield from COSTS[part.estimator](chip, own, part.rule)
        else:
            yield run(chip, part.name, launches=0, ops=STATIC_OPS)
    if len({part.name.split("(")[0] for part in work.patterns}) > 1:
        moved = 8.0 * shape.heads * shape.query_blocks * widest(work)
        yield run(chip, "join", moved=moved, launches=0, ops=JOIN_OPS)


def widest(work: LayerWork) -> int:
    """Entries per row of the layer's index."""
    return max(listed_blocks_of(part.rule) for part in work.patterns)


def plan_steps(chip: Chip, work: LayerWork, shape: Shape) -> Iterator[Step]:
    """What stands between the index and the attention: spans of the rows, gathered columns."""
    most = max(columns_of(part.rule) for part in work.patterns)
    columns = -(-min(most, shape.keys) // BLOCK) * BLOCK
    steps = widest(work).bit_length()
    slots = 400 + steps * 67 + (489 + steps * 107) * columns / 256
    rows = shape.heads * shape.query_blocks
    yield run(chip, "plan_rows", moved=rows * (32.0 + columns / 8), slots=rows * slots)
    dims = shape.head_dim + shape.value_dim
    if columns:
        yield run(chip, "gather_columns", moved=4.0 * shape.heads * columns * dims)


@functools.lru_cache(maxsize=4096)
def breakeven_share(
    chip: Chip, work: LayerWork, *, queries: int, keys: int, batch: int, speedup: float = 1.0
) -> float:
    """The share of the dense work up to which sparse attention is predicted no slower; 0 to 1.

    speedup: what is asked of it instead of being no slower.
    """

    def pays(share: float) -> bool:
        found = predict(chip, work, keys=keys, queries=queries, batch=batch, density=share)
        return found.speedup >= speedup

    low, high = 0.0, 1.0
    if pays(high):
        return high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        low, high = (middle, high) if pays(middle) else (low, middle)
    return low
