"""What sparse attention costs on this CPU and what dense costs: where sparse stops to pay.

Linear models of one layer, in CPU seconds, whose constants constants.py times once per machine:

    dense  = call + cells of every head                         torch's own attention
    sparse = call + rows, tiles and columns of every head + packing of K and V       the generated
    index  = call + (a N + b N^2) of every head                 an estimator

A tile is 64 queries x 64 keys; what is counted for a density d is d N^2/2 cells and, per query
block, half a tile of the diagonal that the causal mask wastes. 64 vertical columns make a tile. A
row is a block of queries. Torch walks the keys in steps of 512 and masks what of the last step lies
after the diagonal: half a step per query more than the N^2/2 cells."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import sympy

from mpass.lowering.index import BLOCK

LENGTH, HEADS, KV_HEADS, DENSITY, COLUMNS = sympy.symbols("N H Hk d k", positive=True)
DENSE_CALL, DENSE_CELL, SPARSE_CALL = sympy.symbols("a c s", positive=True)
ROW, TILE, COLUMN, PACK = sympy.symbols("r t g p", positive=True)

DENSE_STEP = 512
"""Keys that torch's attention takes at a time (its kv split on CPUs)."""

CELLS = (LENGTH**2 + LENGTH * sympy.Min(LENGTH, DENSE_STEP)) / 2
"""Cells that torch's causal attention computes for one head."""

DENSE_SECONDS = DENSE_CALL + DENSE_CELL * HEADS * CELLS
"""CPU seconds of dense causal attention over N tokens."""

TILES = DENSITY * LENGTH**2 / (2 * BLOCK**2) + LENGTH / (2 * BLOCK)
"""Tiles that one head computes when its blocks hold the share d of the causal cells."""

SPARSE_SECONDS = (
    SPARSE_CALL
    + ROW * HEADS * LENGTH / BLOCK
    + TILE * HEADS * TILES
    + COLUMN * HEADS * COLUMNS * LENGTH / BLOCK**2
    + PACK * KV_HEADS * LENGTH / BLOCK
)
"""CPU seconds of the sparse kernel over N tokens at density d and k vertical columns per query."""


@dataclass(frozen=True, slots=True)
class CostConstants:
    """CPU seconds, all threads together: per call, per cell of dense attention; per block of
    queries, per tile and per tile of columns of the sparse kernel, and per block of 64 keys and
    values of one kv head that it packs.
    """

    dense_call: float
    dense_cell: float
    sparse_call: float
    row: float
    tile: float
    column: float
    pack: float

    def substitutions(self) -> dict[sympy.Symbol, float]:
        return {
            DENSE_CALL: self.dense_call,
            DENSE_CELL: self.dense_cell,
            SPARSE_CALL: self.sparse_call,
            ROW: self.row,
            TILE: self.tile,
            COLUMN: self.column,
            PACK: self.pack,
        }


@dataclass(frozen=True, slots=True)
class LinearConstants:
    """CPU seconds of one linear layer on bf16 numbers: as torch has it, in fp32, and in half
    precision, 0 where that is not possible.
    """

    bf16: float
    fp32: float
    half: float = 0.0


@dataclass(frozen=True, slots=True)
class EstimatorConstants:
    """CPU seconds of one estimator: per call, and per head and token or squared token."""

    call: float
    token: float
    squared: float

    @classmethod
    def fit(
        cls, lengths: Sequence[int], seconds: Sequence[float], heads: int
    ) -> EstimatorConstants:
        """The parabola through three timings of `heads` heads, without negative terms."""
        (n1, n2, n3), (t1, t2, t3) = lengths, seconds
        squared = max(0.0, ((t3 - t1) / (n3 - n1) - (t2 - t1) / (n2 - n1)) / (n3 - n2))
        token = max(0.0, (t3 - t1) / (n3 - n1) - squared * (n3 + n1))
        return cls(max(0.0, t1 - token * n1 - squared * n1**2), token / heads, squared / heads)

    def seconds(self, length: int, heads: int) -> float:
        """Of one call for `heads` heads over `length` keys."""
        return self.call + heads * length * (self.token + self.squared * length)


@dataclass(frozen=True, slots=True)
class Prediction:
    """CPU seconds of one layer's attention, dense and sparse."""

    dense: float
    sparse: float

    @property
    def speedup(self) -> float:
        return self.dense / self.sparse


def predict(
    constants: CostConstants,
    *,
    length: int,
    heads: int,
    kv_heads: int,
    density: float,
    columns: float = 0.0,
) -> Prediction:
    """Both costs of one layer, without estimation.

    density: share of the causal cells in blocks that are computed.
    columns: vertical columns per query beside them, on average.
    """
    values = constants.substitutions() | {
        LENGTH: length,
        HEADS: heads,
        KV_HEADS: kv_heads,
        DENSITY: density,
        COLUMNS: columns,
    }
    return Prediction(float(DENSE_SECONDS.subs(values)), float(SPARSE_SECONDS.subs(values)))


def crossover_density(constants: CostConstants, *, length: int, heads: int, kv_heads: int) -> float:
    """Density up to which sparse is no slower than dense, clamped to [0, 1]."""
    values = constants.substitutions() | {LENGTH: length, HEADS: heads, KV_HEADS: kv_heads}
    return min(1.0, max(0.0, float(crossover_formula().subs(values))))


@functools.cache
def crossover_formula() -> sympy.Expr:
    """The density at which both cost the same, in the constants and sizes."""
    (solution,) = sympy.solve((DENSE_SECONDS - SPARSE_SECONDS).subs(COLUMNS, 0), DENSITY)
    return solution
