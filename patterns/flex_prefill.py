"""FlexPrefill: per head and prompt, vertical-slash with budgets by coverage, or pooled blocks.

FlexPrefill (Lai et al., ICLR 2025), algorithms 1 to 3, as released. The last 128 queries tell how
many blocks of columns and how many block diagonals cover `gamma` of their attention. Where the mean
of these queries against mean keys gives nearly the same block weights (Jensen-Shannon distance
below `tau`), mean queries are trusted for the whole prompt: the best pairs of blocks, over all
query blocks together, that hold `gamma` of the attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from mpass.errors import PatternValueError
from mpass.lowering.estimators import FLEX_PREFILL, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import HEAD_DIM, LENGTH, causal_keys, check_positive, register_pattern
from mpass.patterns.base.checks import check_multiple, check_room, check_share
from mpass.patterns.base.scored import ListPattern, attention_cost


@register_pattern
@dataclass(frozen=True)
class FlexPrefill(ListPattern):
    """Cover `gamma` of the attention by whole columns and diagonals of blocks, or by blocks.

    gamma: coverage, 0.9 or 0.95 as published; tau: heads whose mean queries come closer than this
    use them, 0 for none; min_budget, max_budget: tokens per kind (columns, diagonals); block_size:
    tokens; max_blocks: most blocks of 64 keys per query block, the best are kept where it binds.
    """

    gamma: float = 0.9
    tau: float = 0.1
    min_budget: int = 1024
    max_budget: int = 2**31 - 1
    block_size: int = 2 * BLOCK
    max_blocks: int = 512

    name: ClassVar[str] = "flex_prefill"
    estimator: ClassVar[Estimator] = FLEX_PREFILL

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

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.min_budget)

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks cover `gamma` of the attention is the prompt's matter."""
        last = self.block_size * LENGTH * HEAD_DIM
        pooled = 2 * LENGTH * HEAD_DIM + (LENGTH / self.block_size) ** 2 / 2 * HEAD_DIM
        return last + pooled + attention_cost(self.max_blocks)


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(FlexPrefill())


if __name__ == "__main__":
    main()
