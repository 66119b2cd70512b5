"""FlexPrefill: per head and prompt, vertical-slash with budgets by coverage, or pooled blocks.

The rule is FlexPrefill's (Lai et al., ICLR 2025), algorithms 1 to 3, as released. The last 128
queries tell how many blocks of columns and how many block diagonals cover `gamma` of their
attention. Where the mean of these queries against mean keys gives nearly the same block weights
(their Jensen-Shannon distance is below `tau`), mean queries are trusted for the whole prompt: such
a head keeps the best pairs of blocks, over all query blocks together, that hold `gamma` of the
attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy

from mpass.errors import PatternValueError
from mpass.lowering.estimators import FLEX_PREFILL, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Lost,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.checks import check_multiple, check_per, check_room, check_share
from mpass.patterns.base.kv_groups import Per
from mpass.patterns.base.scored import ListPattern, attention_cost


@register_pattern
@dataclass(frozen=True)
class FlexPrefill(ListPattern):
    """Cover `gamma` of the attention by whole columns and diagonals of blocks, or by blocks.

    gamma: This part of the attention is covered; 0.9 and 0.95 are published. A larger gamma keeps
        more.
    tau: A head's mean queries are trusted to choose blocks up to this Jensen-Shannon distance. 0
        trusts them in no head.
    min_budget: At least this many tokens are kept of each kind, columns and diagonals.
    max_budget: At most this many tokens are kept of each kind, columns and diagonals.
    block_size: A block of keys or queries has this many tokens, a multiple of 64.
    max_blocks: A query block keeps at most this many blocks of 64 keys, and the best where this
        binds.
    per: Blocks are chosen for each query "head", or once for the query heads of a "kv_head" that
        have these parameters, at the cost of one of them: they give the query rows in turn.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int = 2**31 - 1
    block_size: int = 2 * BLOCK
    max_blocks: int = 512
    per: Per = "head"

    name: ClassVar[str] = "flex_prefill"
    estimator: ClassVar[Estimator] = FLEX_PREFILL
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 1.0),
        (2048, 0.725),
        (8192, 0.44),
        (32768, 0.393),
    )

    def __post_init__(self) -> None:
        check_positive(self)
        check_share(self, "gamma")
        if isinstance(self.tau, bool) or not 0 <= self.tau <= 1:
            raise PatternValueError(self.name, "tau", self.tau, "a distance from 0 to 1")
        if self.max_budget < self.min_budget:
            allowed = f"min_budget or more ({self.min_budget})"
            raise PatternValueError(self.name, "max_budget", self.max_budget, allowed)
        check_multiple(self, "block_size")
        check_room(self, 2 * self.block_size // BLOCK, self.max_blocks)
        check_per(self)

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.min_budget)

    def denser(self) -> float:
        return float((0.1 / (1.0001 - self.gamma)) ** 0.4)

    def cost(self) -> sympy.Expr:
        """This is an upper bound: how many blocks cover `gamma` depends on the prompt."""
        last = self.block_size * LENGTH * HEAD_DIM
        pooled = 2 * LENGTH * HEAD_DIM + (LENGTH / self.block_size) ** 2 / 2 * HEAD_DIM
        return last + pooled + attention_cost(self.max_blocks)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(0.5, 1.0, 1, block_size=64), cls(0.6, 0.0, 64, 128)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return tuple(f"flex_prefill(gamma={x})" for x in (0.5, 0.7, 0.8, 0.9, 0.95))

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(gamma=0.05 + 0.945 * x, min_budget=max(64, int(1024 * x)))}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "a larger gamma"


if __name__ == "__main__":
    FlexPrefill.main()
