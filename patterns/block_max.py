"""Block-max: key blocks that score at least a share of the best one for a tile of queries.

FlashPrefill (arXiv 2603.06199), and its second version (arXiv 2608.19758) for the defaults: keys
are averaged over blocks of 128; a tile of 128 queries gives block J the score
`sum over its rows of exp(q . mean(K_J) * scale - m)`, m the greatest exponent of the tile. Kept are
the blocks that score at least `share` times the best, the first blocks, the nearest, and everything
for the last tiles. Nothing is sorted or summed up, which makes it the cheapest of the adaptive
patterns; published results start at 4K tokens and hold to 256K.
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
class BlockMax(ListPattern):
    """Keep the blocks that score at least `share` of the best one.

    share: smaller keeps more; block_size: tokens per tile of queries and per block of keys;
    sink_blocks, local_blocks: first and nearest blocks of that size, the own included;
    last_blocks: tiles at the end of the prompt that keep everything; max_blocks: most blocks of 64
    keys per tile, the best are kept where it binds.
    """

    share: float = 0.1
    block_size: int = 2 * BLOCK
    sink_blocks: int = 2
    local_blocks: int = 4
    last_blocks: int = 2
    max_blocks: int = 512

    name: ClassVar[str] = "block_max"
    estimator: ClassVar[Estimator] = BLOCK_SCORES

    def __post_init__(self) -> None:
        check_share(self, "share")
        check_blocks(self)

    def rule(self) -> BlockScoresRule:
        return BlockScoresRule(**self.parameters(), mass=None)  # type: ignore[arg-type]

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks come near the best one is the prompt's matter."""
        return tile_cost(self.block_size) + attention_cost(self.max_blocks)


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(BlockMax())


if __name__ == "__main__":
    main()
