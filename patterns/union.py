"""Vertical-block, named union: key blocks per query block, and vertical columns per head.

A query block keeps the key blocks that hold most of its attention, which keeps what is spread over
neighbouring keys. Vertical columns (single keys) keep what the last queries look for wherever it
stands, which a block's mean would hide. Either alone fails where the other is strong: columns lose
fluency, and without them the end of a prompt loses three times as much. Both come from softmax
weights of real query rows, so the number of blocks adapts to each head, prompt and query block.

For some rows of a query block, the softmax over pooled keys (means of runs of keys) of
`q . mean(run) * scale + log(size of run)`, summed over those of a key block, is the attention
that the row would give to the block. A query block keeps its forced blocks; the blocks to which one
row gives `row_share` or more (what one token looks for must not be averaged away); and then the
best ones by the sum over rows, until `mass` of it is held. Columns are chosen by the vertical
scores of MInference 1.0, section 3.2, from the last 16 queries instead of 64: what earlier queries
look for stands in the blocks. Generated C++ rounds means and rows to 8 bits where the machine
multiplies those (SageAttention, arXiv 2410.02367, section 4.2), which is exact enough to choose.
The pattern is for prompts from 4K tokens on where loss matters more than speed: it costs more to
estimate than block_max.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Self, cast

import sympy
from torch import Tensor

from mpass.errors import PatternValueError
from mpass.lowering.estimators import VERTICAL_BLOCK, Estimator
from mpass.lowering.index import BLOCK, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.patterns.base import HEAD_DIM, LENGTH, Lost, register_pattern
from mpass.patterns.base.checks import check_blocks, check_divisor, check_per, check_share
from mpass.patterns.base.kv_groups import Per, Turns
from mpass.patterns.base.scored import ListPattern, attention_cost

LAST_QUERIES_CHOICES = (16, 32, 64)
"""Numbers of queries that the generated C++ has a loop for."""

CANDIDATE_SHARES = (
    (0.5, 0.5),
    (0.5, 0.25),
    (0.7, 0.25),
    (0.7, 0.1),
    (0.8, 0.05),
    (0.8, 0.02),
    (0.9, 0.02),
    (0.95, 0.01),
)
"""`mass` and `row_share` that a calibration tries, from the cheapest to nearly everything."""

CANDIDATE_ROWS = ((0.05, 256), (0.03, 256), (0.03, 512), (0.015, 512))
"""`row_share` and `columns` between them, where single rows decide more than the sum."""

LONG_POWER = 0.5
"""How fast `row_share` falls with the length beyond `at_length`: SmolLM2's divergence at 2048 to
8192 tokens stays the same where share * length does, Gemma-3's from 8192 to 32768 where
share * length ** 0.5 does."""


@register_pattern
@dataclass(frozen=True)
class VerticalBlock(ListPattern):
    """Keep blocks up to a share of the estimated attention, and the strongest vertical columns.

    Without causality the nearest blocks are those on both sides, and as many queries as
    `last_queries` says, evenly spaced over all of them, choose the columns.

    mass: The kept blocks hold this part of a query block's estimated attention. 1 keeps all.
    row_share: A block to which one row gives this part of its attention is kept, too. 1 keeps no
        block for that reason.
    columns: A head keeps this many vertical columns (single keys), those with the most attention
        of the last `last_queries` queries.
    sink_blocks: This many of the first blocks are always kept.
    local_blocks: This many of the nearest blocks are always kept, the own one included.
    last_blocks: This many query blocks at the end of the prompt keep every block.
    rows: This many query rows of a block of 64 are looked at. The number divides 64.
    pool: The mean of this many keys stands for all of them. The number divides 64.
    max_blocks: A query block keeps at most this many blocks, and the best where this binds. The
        index takes 4 * max_blocks bytes per 64 queries and head.
    last_queries: The columns are chosen by this many queries at the end of the prompt: 16, 32 or
        64.
    per: Blocks are chosen for each query "head", or once for the query heads of a "kv_head" that
        have these parameters, at the cost of one of them: they give the query rows in turn.
    at_length: `row_share` is meant for prompts of this many keys, and shorter prompts have a larger
        one, longer prompts a smaller one (`at`). 0 for one share at every length.
    """

    mass: float = 0.6
    row_share: float = 0.018
    columns: int = 256
    sink_blocks: int = 1
    local_blocks: int = 2
    last_blocks: int = 0
    rows: int = 16
    pool: int = 8
    max_blocks: int = 256
    last_queries: int = 16
    per: Per = "head"
    at_length: int = 0

    name: ClassVar[str] = "union"
    estimator: ClassVar[Estimator] = VERTICAL_BLOCK
    bidirectional: ClassVar[bool] = True
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 1.0),
        (2048, 0.64),
        (4096, 0.415),
        (8192, 0.24),
        (32768, 0.122),
    )

    def __post_init__(self) -> None:
        check_share(self, "mass", "row_share")
        check_blocks(self)
        check_divisor(self, "rows", "pool")
        if self.last_queries not in LAST_QUERIES_CHOICES:
            allowed = ", ".join(map(str, LAST_QUERIES_CHOICES))
            raise PatternValueError(self.name, "last_queries", self.last_queries, allowed)
        check_per(self)

    def at(self, keys: int) -> Self:
        """What this is where queries see `keys` keys: the same with one `row_share`, at any length.

        Of fewer keys than `at_length` a block has a larger part to begin with, and the share grows
        as the number of blocks falls. It falls with the root of their number beyond.
        """
        if not self.at_length:
            return self
        ratio = self.at_length / max(1, keys)
        share = self.row_share * (ratio if ratio >= 1 else ratio**LONG_POWER)
        return replace(self, row_share=min(1.0, share), at_length=0)

    def numbers(self) -> dict[str, int | float | bool | str]:
        """The estimator is told of one `row_share`, and not of the length that it is for."""
        return {name: value for name, value in super().numbers().items() if name != "at_length"}

    def __str__(self) -> str:
        """`at_length` is left out where it says nothing."""
        text = super().__str__()
        return f"{text[:-1]}, at_length={self.at_length})" if self.at_length else text

    def usual_density(self, length: int) -> float:
        own = self.at(length)
        return super().usual_density(length) if own is self else own.usual_density(length)

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        return super().estimate(inputs, cls.all_at(inputs, patterns))

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        return super().select(inputs, cls.all_at(inputs, patterns))

    @classmethod
    def all_at(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Sequence[Self]:
        """The patterns as they are where queries see as many keys as those of a call do."""
        found = patterns_at(tuple(patterns), keys_seen(inputs))
        return cast("Sequence[Self]", found)

    def turns(self) -> Turns:
        """The rows that are looked at come from one head after the other, and so do the last 16."""
        length = BLOCK // self.rows
        return Turns(length, LAST_QUERIES_CHOICES[0] // length)

    def denser(self) -> float:
        return float((0.018 / self.row_share) ** 0.5 * max(1.0, self.mass / 0.6))

    def cost(self) -> sympy.Expr:
        """This is an upper bound: how many blocks hold `mass` depends on the prompt."""
        looked_at = LENGTH * sympy.Rational(self.rows, BLOCK)
        pooled = LENGTH * HEAD_DIM + looked_at * LENGTH / (2 * self.pool) * HEAD_DIM
        vertical = self.last_queries * LENGTH * HEAD_DIM if self.columns else 0
        return pooled + vertical + attention_cost(self.max_blocks, self.columns)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return (
            cls(0.1, 0.9, 16, local_blocks=1),
            cls(0.5, 0.15, 20, at_length=800),
            cls(0.8, 1.0, 5, 0, 1, rows=64, pool=64, max_blocks=3),
        )

    @classmethod
    def candidates(cls) -> tuple[Self, ...]:
        shares = [
            cls(mass=mass, row_share=share, columns=columns)
            for mass, share in CANDIDATE_SHARES
            for columns in (64, 512)
        ]
        rows = [cls(row_share=share, columns=columns) for share, columns in CANDIDATE_ROWS]
        return (*shares, *rows)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return (
            "union(mass=0.3, row_share=0.15)",
            "union(mass=0.5, row_share=0.06)",
            "union(mass=0.7, row_share=0.04)",
            "union(mass=0.7, row_share=0.03)",
            "union",
            "union(mass=0.7, row_share=0.02)",
            "union(mass=0.6, row_share=0.015)",
            "union(mass=0.6, row_share=0.02, rows=32)",
            "union(mass=0.7, row_share=0.02, pool=4)",
            "union(mass=0.8, row_share=0.01)",
            "union(mass=0.85, row_share=0.007)",
        )

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {
            "union": lambda x: cls(mass=0.7, row_share=0.5 * 0.002**x),
            "union, 512 columns": lambda x: cls(0.7, row_share=0.5 * 0.002**x, columns=512),
            "union by mass": lambda x: cls(mass=0.1 + 0.895 * x, row_share=0.1),
        }

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "more columns" if lost == "vertical" else "a larger mass"


def keys_seen(inputs: EstimateInputs) -> int:
    """How many keys the last query of a call sees at most."""
    window = inputs.mask.window
    return min(inputs.num_keys, window) if window else inputs.num_keys


@functools.lru_cache(maxsize=4096)
def patterns_at(patterns: tuple[VerticalBlock, ...], keys: int) -> tuple[VerticalBlock, ...]:
    """`VerticalBlock.at` of each pattern: the same heads ask in each call."""
    return tuple(pattern.at(keys) for pattern in patterns)


Union = VerticalBlock
"""The older name of the class; the pattern itself is still named union."""


if __name__ == "__main__":
    VerticalBlock.main()
