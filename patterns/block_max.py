"""Block-max: key blocks that score at least a share of the best one for a tile of queries.

The rule is FlashPrefill's (arXiv 2603.06199); the defaults are those of its second version (arXiv
2608.19758). Keys are averaged over blocks of 128. A tile of 128 queries gives block J the score
`sum over its rows of exp(q . mean(K_J) * scale - m)`, where m is the greatest exponent of the tile.
A tile keeps the blocks that score at least `share` times the best one, the first blocks and the
nearest ones; the last tiles keep everything. Nothing is sorted or summed up, which makes this the
cheapest of the adaptive patterns. Published results start at 4K tokens and hold to 256K.
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
class BlockMax(ListPattern):
    """Keep the key blocks that score at least `share` of the best one.

    share: A block needs this part of the best block's score. A smaller share keeps more.
    block_size: A tile of queries and a block of keys have this many tokens, a multiple of 64.
    sink_blocks: This many of the first blocks are always kept.
    local_blocks: This many of the nearest blocks are always kept, the tile's own included.
    last_blocks: This many tiles at the end of the prompt keep every block.
    max_blocks: A tile keeps at most this many blocks of 64 keys, and the best where this binds.
    per: Blocks are chosen for each query "head", or once for the query heads of a "kv_head" that
        have these parameters, at the cost of one of them: they give the query rows in turn.
    """

    share: float = 0.1
    block_size: int = 2 * BLOCK
    sink_blocks: int = 2
    local_blocks: int = 4
    last_blocks: int = 2
    max_blocks: int = 512
    per: Per = "head"

    name: ClassVar[str] = "block_max"
    estimator: ClassVar[Estimator] = BLOCK_SCORES
    bidirectional: ClassVar[bool] = True
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 1.0),
        (2048, 0.836),
        (4096, 0.555),
        (8192, 0.44),
        (32768, 0.23),
    )

    def __post_init__(self) -> None:
        check_share(self, "share")
        check_blocks(self)
        check_per(self)

    def rule(self) -> BlockScoresRule:
        return BlockScoresRule(**self.numbers(), mass=None)

    def denser(self) -> float:
        return float((0.1 / self.share) ** 0.3)

    def cost(self) -> sympy.Expr:
        """This is an upper bound: how many blocks come near the best one depends on the prompt."""
        return tile_cost(self.block_size) + attention_cost(self.max_blocks)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(0.95, 64, 1, 1, 0), cls(0.5, 64, 1, 1, 1), cls(0.9, 128, 1, 1, 0, 4)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return tuple(f"block_max(share={x})" for x in (0.03, 0.1, 0.3, 0.8))

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(share=0.9 * 0.001**x)}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "a smaller share"


if __name__ == "__main__":
    BlockMax.main()
