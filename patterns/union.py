"""Vertical-block, named union: key blocks per query block, and vertical columns per head.

A query block keeps the key blocks that hold most of its attention, which keeps what is spread over
neighbouring keys; vertical columns (single keys) keep what the last queries look for wherever it
stands, which a block's mean would hide. Either alone fails where the other is strong: columns lose
fluency, and without them the end of a prompt loses three times as
much. Both come from softmax weights of real query rows, so the number of blocks adapts to each
head, prompt and query block.

For some rows of a query block: softmax over pooled keys (means of runs of keys) of
`q . mean(run) * scale + log(size of run)`, summed over those of a key block, is the attention
that the row would give to the block. A query block keeps its forced blocks; the blocks to which one
row gives `row_share` or more (what one token looks for must not be averaged away); and then the
best ones by the sum over rows, until `mass` of it is held. Columns: the vertical scores of
MInference 1.0, section 3.2, from the last 16 queries instead of 64: what earlier ones look for
stands in the blocks. Generated C++ rounds means and rows to 8 bits where the machine multiplies
those (SageAttention, arXiv 2410.02367, section 4.2): they only choose. For prompts from 4K tokens
on when loss matters more than the last bit of speed: estimation is dearer than that of block_max.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import sympy

from mpass.errors import PatternValueError
from mpass.lowering.estimators import VERTICAL_BLOCK, Estimator
from mpass.lowering.index import BLOCK
from mpass.patterns.base import HEAD_DIM, LENGTH, register_pattern
from mpass.patterns.base.checks import check_blocks, check_divisor, check_share
from mpass.patterns.base.scored import ListPattern, attention_cost

LAST_QUERIES_CHOICES = (16, 32, 64)
"""Numbers of queries that the generated C++ has a loop for."""


@register_pattern
@dataclass(frozen=True)
class VerticalBlock(ListPattern):
    """Keep blocks up to a share of the estimated attention, and the strongest vertical columns.

    mass: share of the estimated attention of a query block that its kept blocks hold; 1 keeps all.
    row_share: a block that one row gives this share of its attention is kept too; 1 for none.
    columns: vertical columns (single keys) per head, those with the most attention of the last
    `last_queries` queries (16, 32 or 64).
    sink_blocks, local_blocks: first blocks and nearest blocks (the own included), always kept.
    last_blocks: query blocks at the end of the prompt that keep every block.
    rows: query rows per block of 64 that are looked at; pool: keys per run. Both divide 64.
    max_blocks: most blocks per query block; where it binds, the best are kept. It bounds the
    memory of the index: 4 * max_blocks bytes per 64 queries and head.
    """

    mass: float = 0.6
    row_share: float = 0.018
    columns: int = 256
    sink_blocks: int = 1
    local_blocks: int = 2
    last_blocks: int = 0
    rows: int = 16
    pool: int = 8
    max_blocks: int = 256
    last_queries: int = 16

    name: ClassVar[str] = "union"
    estimator: ClassVar[Estimator] = VERTICAL_BLOCK

    def __post_init__(self) -> None:
        check_share(self, "mass", "row_share")
        check_blocks(self)
        check_divisor(self, "rows", "pool")
        if self.last_queries not in LAST_QUERIES_CHOICES:
            allowed = ", ".join(map(str, LAST_QUERIES_CHOICES))
            raise PatternValueError(self.name, "last_queries", self.last_queries, allowed)

    def cost(self) -> sympy.Expr:
        """An upper bound: how many blocks hold `mass` of the attention is the prompt's matter."""
        looked_at = LENGTH * sympy.Rational(self.rows, BLOCK)
        pooled = LENGTH * HEAD_DIM + looked_at * LENGTH / (2 * self.pool) * HEAD_DIM
        vertical = self.last_queries * LENGTH * HEAD_DIM if self.columns else 0
        return pooled + vertical + attention_cost(self.max_blocks, self.columns)


Union = VerticalBlock
"""The older name of the class; the pattern itself is still named union."""


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(VerticalBlock())


if __name__ == "__main__":
    main()
