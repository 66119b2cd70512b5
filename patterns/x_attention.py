"""XAttention: blocks by the sums of their antidiagonals, until a share of the mass is kept.

The rule is XAttention's (Xu et al., ICML 2025), sections 2.1 to 2.3, and its released code's.
Queries and keys are grouped by `stride`. A pair of groups scores the mean of its antidiagonal,
which every vertical and every diagonal line of attention crosses. After a softmax per group of
queries, scores are summed over tiles of 128 x 128. A tile of queries keeps its first and its
diagonal block, then the best ones until they hold `threshold` of the sum. This sees more than
pooled means do and costs more: estimation alone takes 1 / (2 * stride) of dense attention.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Self

import sympy

from mpass.lowering.estimators import X_ATTENTION, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import HEAD_DIM, LENGTH, Lost, register_pattern
from mpass.patterns.base.checks import check_blocks, check_divisor, check_per, check_share
from mpass.patterns.base.kv_groups import Per, Turns
from mpass.patterns.base.scored import ListPattern, attention_cost


@register_pattern
@dataclass(frozen=True)
class XAttention(ListPattern):
    """Keep the fewest blocks that hold `threshold` of a tile's antidiagonal scores.

    threshold: The kept blocks hold this part of a tile's scores. A larger threshold keeps more; 0.9
        is published as one value for all heads.
    stride: A group has this many queries or keys; 8 and 16 are published. The number divides 64.
    block_size: A tile of queries and a block of keys have this many tokens, a multiple of 64.
    sink_blocks: This many of the first blocks are always kept.
    local_blocks: This many of the nearest blocks are always kept, the tile's own included.
    last_blocks: This many tiles at the end of the prompt keep every block.
    max_blocks: A tile keeps at most this many blocks of 64 keys, and the best where this binds.
    per: Blocks are chosen for each query "head", or once for the query heads of a "kv_head" that
        have these parameters, at the cost of one of them: they give the query rows in turn.
    """

    threshold: float = 0.9
    stride: int = 8
    block_size: int = 2 * BLOCK
    sink_blocks: int = 1
    local_blocks: int = 1
    last_blocks: int = 0
    max_blocks: int = 512
    per: Per = "head"

    name: ClassVar[str] = "x_attention"
    estimator: ClassVar[Estimator] = X_ATTENTION
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 0.65),
        (2048, 0.437),
        (8192, 0.36),
        (32768, 0.31),
    )

    def __post_init__(self) -> None:
        check_share(self, "threshold")
        check_blocks(self)
        check_divisor(self, "stride")
        check_per(self)

    def turns(self) -> Turns:
        """A group of queries, which is one vector, comes from one head."""
        return Turns(self.stride)

    def denser(self) -> float:
        return float((0.1 / (1.0001 - self.threshold)) ** 0.6)

    def cost(self) -> sympy.Expr:
        """This is an upper bound: how many blocks hold `threshold` depends on the prompt."""
        estimation = LENGTH**2 / (2 * self.stride) * HEAD_DIM
        return estimation + attention_cost(self.max_blocks)

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(0.5, block_size=64), cls(0.6, 16, max_blocks=6)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        shares = (0.5, 0.7, 0.8, 0.9, 0.95, 0.975)
        return tuple(f"x_attention(threshold={x})" for x in shares)

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(threshold=0.05 + 0.945 * x)}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "a larger threshold"


if __name__ == "__main__":
    XAttention.main()
