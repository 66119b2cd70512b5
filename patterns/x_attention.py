"""XAttention: blocks by the sums of their antidiagonals, until a share of the mass is kept.

XAttention (Xu et al., ICML 2025), sections 2.1 to 2.3, and its released code: queries and keys are
grouped by `stride`; a group pair scores the mean of its antidiagonal, which every vertical and
diagonal line of attention crosses; softmax per group of queries; tiles of 128 x 128 sum up; per
tile of queries the first and the diagonal block, then the best ones until `threshold` of the sum.
Finer than pooled means and dearer: estimation alone takes 1 / (2 * stride) of dense attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from mpass.lowering.estimators import X_ATTENTION, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import HEAD_DIM, LENGTH, register_pattern
from mpass.patterns.base.checks import check_blocks, check_divisor, check_share
from mpass.patterns.base.scored import ListPattern, attention_cost


@register_pattern
@dataclass(frozen=True)
class XAttention(ListPattern):
    """Keep the fewest blocks that hold `threshold` of a tile's antidiagonal scores.

    threshold: 0.9 as published for one value for all heads; stride: positions per group, 8 or 16
    as published, a divisor of 64; block_size: tokens per tile of queries and block of keys;
    sink_blocks, local_blocks: first and nearest blocks of that size, the own included; last_blocks:
    tiles at the end that keep everything; max_blocks: most blocks of 64 keys per tile.
    """

    threshold: float = 0.9
    stride: int = 8
    block_size: int = 2 * BLOCK
    sink_blocks: int = 1
    local_blocks: int = 1
    last_blocks: int = 0
    max_blocks: int = 512

    name: ClassVar[str] = "x_attention"
    estimator: ClassVar[Estimator] = X_ATTENTION

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        check_blocks(self)
        check_divisor(self, "stride")

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks hold `threshold` of the mass is the prompt's matter."""
        estimation = LENGTH**2 / (2 * self.stride) * HEAD_DIM
        return estimation + attention_cost(self.max_blocks)


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(XAttention())


if __name__ == "__main__":
    main()
