"""Block-max: key blocks that score at least a share of the best one for a tile of queries.

FlashPrefill (arXiv 2603.06199), and its second version (arXiv 2608.19758) for the defaults: keys
are averaged over blocks of 128; a tile of 128 queries gives block J the score
`sum over its rows of exp(q . mean(K_J) * scale - m)`, m the greatest exponent of the tile. Kept are
the blocks that score at least `share` times the best, the first blocks, the nearest, and everything
for the last tiles. Nothing is sorted or summed up, which makes it the cheapest of the adaptive
patterns; published results start at 4K tokens and hold to 256K.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy
from mpass.lowering.estimate_tiles import TileRule, tile_index, tile_width
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, SparseIndex
from mpass.patterns.base import HEAD_DIM, LENGTH, check_positive, register_pattern
from mpass.patterns.lists import (
    ListPattern,
    attention_cost,
    check_multiple,
    check_room,
    check_share,
)
from torch import Tensor


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

    def __post_init__(self) -> None:
        check_positive(self, sink_blocks=True, last_blocks=True)
        check_share(self, "share")
        check_multiple(self, "block_size")
        forced = (self.sink_blocks + self.local_blocks) * self.block_size // BLOCK
        check_room(self, forced, self.max_blocks)

    @classmethod
    def index(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        heads: Sequence[int],
        patterns: Sequence[Self],
        *,
        scale: float,
    ) -> SparseIndex:
        return tile_index(query, key, mask, heads, [p.rule() for p in patterns], scale=scale)

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return tile_width([p.rule() for p in patterns])

    def rule(self) -> TileRule:
        """The parameters as the estimator takes them."""
        return TileRule(mass=None, **self.parameters())  # type: ignore[arg-type]

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks come near the best one is the prompt's matter."""
        pooled = LENGTH * HEAD_DIM + LENGTH**2 / (2 * self.block_size) * HEAD_DIM
        return pooled + attention_cost(self.max_blocks)


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.draw import draw_main

    draw_main(BlockMax())


if __name__ == "__main__":
    main()
