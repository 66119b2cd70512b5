"""Block-sparse: per block of queries, the key blocks of largest mean-pooled score.

MInference 1.0, sections 3.1 and 3.2, Algorithm 3. The diagonal block is always kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from mpass.errors import PatternValueError
from mpass.lowering.estimators import BLOCK_SPARSE, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.scored import ListPattern


@register_pattern
@dataclass(frozen=True)
class BlockSparse(ListPattern):
    """Keep the `top_k` key blocks per query block; blocks hold `block_size` tokens each."""

    top_k: int = 100
    block_size: int = BLOCK

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

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.top_k * self.block_size)

    def cost(self) -> sympy.Expr:
        blocks = LENGTH / self.block_size
        estimation = blocks**2 * HEAD_DIM / 2 + 2 * LENGTH * HEAD_DIM
        return estimation + 2 * LENGTH * self.min_keys() * HEAD_DIM


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(BlockSparse())


if __name__ == "__main__":
    main()
