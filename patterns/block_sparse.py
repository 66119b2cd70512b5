"""Block-sparse: per block of queries, the key blocks of largest mean-pooled score.

MInference 1.0, sections 3.1 and 3.2, Algorithm 3. The diagonal block is always kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import sympy
from torch import Tensor

from mpass.errors import PatternValueError
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference import vertical_slash as estimate
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Pattern,
    causal_keys,
    check_positive,
    register_pattern,
)


@register_pattern
@dataclass(frozen=True)
class BlockSparse(Pattern):
    """Keep the `top_k` key blocks per query block; blocks hold `block_size` tokens each."""

    top_k: int = 100
    block_size: int = BLOCK

    name: ClassVar[str] = "block_sparse"
    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    budgeted: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self)
        if self.block_size % BLOCK:
            raise PatternValueError(
                self.name, "block_size", self.block_size, f"a multiple of {BLOCK}"
            )

    @classmethod
    def estimate(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        heads: Sequence[int],
        patterns: Sequence[Self],
        *,
        scale: float,
    ) -> SparseIndex:
        block_top_k_index = choose_lowering(query, key, key).function("block_top_k_index")
        index: SparseIndex = block_top_k_index(
            query,
            key,
            mask,
            heads,
            top_k=[p.top_k for p in patterns],
            block_sizes=[p.block_size for p in patterns],
        )
        return index

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return estimate.block_top_k_width(
            [p.top_k for p in patterns], [p.block_size for p in patterns]
        )

    @classmethod
    def select(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        heads: Sequence[int],
        patterns: Sequence[Self],
        *,
        scale: float,
    ) -> Tensor:
        index = estimate.block_top_k_index(
            query,
            key,
            mask,
            heads,
            top_k=[p.top_k for p in patterns],
            block_sizes=[p.block_size for p in patterns],
        )
        return reference.computed_mask(
            index,
            mask,
            batch=query.shape[0],
            num_queries=query.shape[2],
            num_keys=key.shape[2],
        )

    def fewest_keys(self) -> sympy.Expr:
        return causal_keys(self.top_k * self.block_size)

    def cost(self) -> sympy.Expr:
        blocks = LENGTH / self.block_size
        estimation = blocks**2 * HEAD_DIM / 2 + 2 * LENGTH * HEAD_DIM
        return estimation + 2 * LENGTH * self.fewest_keys() * HEAD_DIM


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(BlockSparse())


if __name__ == "__main__":
    main()
