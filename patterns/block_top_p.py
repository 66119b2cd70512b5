"""Block top-p: per tile of queries the fewest key blocks that hold a share of all scores.

Scores as of block_max (FlashPrefill, arXiv 2603.06199); the cut is by cumulative mass, as in
FlexPrefill (ICLR 2025) and XAttention (ICML 2025), instead of relative to the best block. Diffuse
heads keep more, sharp ones less; one more sort per tile than block_max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from mpass.lowering.estimators import BLOCK_SCORES, Estimator
from mpass.lowering.index import BLOCK
from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.patterns.base import register_pattern
from mpass.patterns.base.checks import check_blocks, check_share
from mpass.patterns.base.scored import ListPattern, attention_cost, tile_cost


@register_pattern
@dataclass(frozen=True)
class BlockTopP(ListPattern):
    """Keep the fewest blocks that hold `mass` of a tile's scores; other fields as of block_max."""

    mass: float = 0.9
    block_size: int = 2 * BLOCK
    sink_blocks: int = 2
    local_blocks: int = 4
    last_blocks: int = 2
    max_blocks: int = 512

    name: ClassVar[str] = "block_top_p"
    estimator: ClassVar[Estimator] = BLOCK_SCORES

    def __post_init__(self) -> None:
        check_share(self, "mass")
        check_blocks(self)

    def rule(self) -> BlockScoresRule:
        return BlockScoresRule(**self.parameters(), share=None)  # type: ignore[arg-type]

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks hold `mass` of the scores is the prompt's matter."""
        return tile_cost(self.block_size) + attention_cost(self.max_blocks)


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(BlockTopP())


if __name__ == "__main__":
    main()
