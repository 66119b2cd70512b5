"""Block-sparse: per block of queries, the key blocks of largest mean-pooled score.

The rule is that of MInference 1.0, sections 3.1 and 3.2, Algorithm 3. The diagonal block is always
kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy

from mpass.errors import PatternValueError
from mpass.lowering.estimators import BLOCK_SPARSE, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Lost,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.checks import check_per
from mpass.patterns.base.kv_groups import Per
from mpass.patterns.base.scored import ListPattern


@register_pattern
@dataclass(frozen=True)
class BlockSparse(ListPattern):
    """Keep the `top_k` key blocks of the largest mean score per query block.

    top_k: Every query block keeps this many key blocks, the diagonal block included.
    block_size: A block of keys or queries has this many tokens, a multiple of 64.
    per: Blocks are chosen for each query "head", or once for the query heads of a "kv_head" that
        have these parameters, at the cost of one of them: they give the query rows in turn.
    """

    top_k: int = 100
    block_size: int = BLOCK
    per: Per = "head"

    name: ClassVar[str] = "block_sparse"
    estimator: ClassVar[Estimator] = BLOCK_SPARSE
    fixed_budget: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self)
        if self.block_size % BLOCK:
            raise PatternValueError(
                self.name, "block_size", self.block_size, f"a multiple of {BLOCK}"
            )
        check_per(self)

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.top_k * self.block_size)

    def cost(self) -> sympy.Expr:
        blocks = LENGTH / self.block_size
        estimation = blocks**2 * HEAD_DIM / 2 + 2 * LENGTH * HEAD_DIM
        return estimation + 2 * LENGTH * self.min_keys() * HEAD_DIM

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(top_k=2), cls(1, 128)

    @classmethod
    def candidates(cls) -> tuple[Self, ...]:
        """Table 7 of MInference's paper (arXiv 2407.02490), and cheaper ones."""
        return tuple(cls(count) for count in (100, 8, 16, 32))

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return tuple(f"block_sparse({max(4, length // 64 // part)})" for part in (10, 5))

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(top_k=1 + int(length // 64 * x))}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "a larger top_k"


if __name__ == "__main__":
    BlockSparse.main()
