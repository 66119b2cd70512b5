"""Block top-p: per tile of queries the fewest key blocks that hold a share of all scores.

Scores are those of block_max (FlashPrefill, arXiv 2603.06199). The cut is by cumulative mass, as in
FlexPrefill (ICLR 2025) and XAttention (ICML 2025), instead of relative to the best block: diffuse
heads keep more blocks and sharp heads fewer. It takes one more sort per tile than block_max.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy

from mpass.lowering.estimators import BLOCK_SCORES, Estimator
from mpass.lowering.index import BLOCK
from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.patterns.base import Lost, register_pattern
from mpass.patterns.base.checks import check_blocks, check_per, check_share
from mpass.patterns.base.kv_groups import Per
from mpass.patterns.base.scored import ListPattern, attention_cost, tile_cost


@register_pattern
@dataclass(frozen=True)
class BlockTopP(ListPattern):
    """Keep the fewest key blocks that hold `mass` of a tile's scores.

    mass: The kept blocks hold this part of the sum of a tile's scores. A larger mass keeps more.
    block_size: A tile of queries and a block of keys have this many tokens, a multiple of 64.
    sink_blocks: This many of the first blocks are always kept.
    local_blocks: This many of the nearest blocks are always kept, the tile's own included.
    last_blocks: This many tiles at the end of the prompt keep every block.
    max_blocks: A tile keeps at most this many blocks of 64 keys, and the best where this binds.
    per: Blocks are chosen for each query "head", or once for the query heads of a "kv_head" that
        have these parameters, at the cost of one of them: they give the query rows in turn.
    """

    mass: float = 0.9
    block_size: int = 2 * BLOCK
    sink_blocks: int = 2
    local_blocks: int = 4
    last_blocks: int = 2
    max_blocks: int = 512
    per: Per = "head"

    name: ClassVar[str] = "block_top_p"
    estimator: ClassVar[Estimator] = BLOCK_SCORES
    bidirectional: ClassVar[bool] = True
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 1.0),
        (2048, 0.82),
        (4096, 0.59),
        (8192, 0.5),
        (32768, 0.25),
    )

    def __post_init__(self) -> None:
        check_share(self, "mass")
        check_blocks(self)
        check_per(self)

    def rule(self) -> BlockScoresRule:
        return BlockScoresRule(**self.numbers(), share=None)

    def denser(self) -> float:
        return self.mass / 0.9

    def cost(self) -> sympy.Expr:
        """This is an upper bound: how many blocks hold `mass` depends on the prompt."""
        return tile_cost(self.block_size) + attention_cost(self.max_blocks)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(0.3, 64, 0, 1, 0), cls(0.5, 128, 1, 1, 1, 4)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return tuple(f"block_top_p(mass={x})" for x in (0.3, 0.6, 0.8, 0.9))

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(mass=0.05 + 0.945 * x)}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "a larger mass"


if __name__ == "__main__":
    BlockTopP.main()
