"""Block top-p: per tile of queries the fewest key blocks that hold a share of all scores.

Scores as of block_max (FlashPrefill, arXiv 2603.06199); the cut is by cumulative mass, as in
FlexPrefill (ICLR 2025) and XAttention (ICML 2025), instead of relative to the best block. Diffuse
heads keep more, sharp ones less; one more sort per tile than block_max.
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
class BlockTopP(ListPattern):
    """Keep the fewest blocks that hold `mass` of a tile's scores; other fields as of block_max."""

    mass: float = 0.9
    block_size: int = 2 * BLOCK
    sink_blocks: int = 2
    local_blocks: int = 4
    last_blocks: int = 2
    max_blocks: int = 512

    name: ClassVar[str] = "block_top_p"

    def __post_init__(self) -> None:
        check_positive(self, sink_blocks=True, last_blocks=True)
        check_share(self, "mass")
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
        return TileRule(share=None, **self.parameters())  # type: ignore[arg-type]

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks hold `mass` of the scores is the prompt's matter."""
        pooled = LENGTH * HEAD_DIM + LENGTH**2 / (2 * self.block_size) * HEAD_DIM
        return pooled + attention_cost(self.max_blocks)


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.draw import draw_main

    draw_main(BlockTopP())


if __name__ == "__main__":
    main()
