"""SampleAttention: a local window in proportion to the prompt, and columns by coverage.

SampleAttention (Zhu et al., arXiv 2406.15486), section 4, with its published shares: 5% of the
queries, evenly spread, attend to everything; the fewest columns that hold 95% of what they attend
to are kept; so are the nearest 8% of the prompt for every query. The number of columns adapts to
head and prompt; where the limit binds, the strongest are kept.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import sympy
import torch
from torch import Tensor

from mpass.lowering.estimators import SAMPLE_ATTENTION, Estimator
from mpass.lowering.index import BLOCK
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import allowed_cells
from mpass.lowering.reference.sample_attention import sample_attention_columns, window_size
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.checks import check_share
from mpass.patterns.base.scored import EstimatedPattern


@register_pattern
@dataclass(frozen=True)
class SampleAttention(EstimatedPattern):
    """Keep the nearest keys, and the columns that sampled queries attend to.

    coverage: share of the sampled attention that the columns hold; row_share: share of the queries
    that is sampled; window_share: nearest keys as a share of the prompt, at most max_window tokens;
    max_columns: most columns per head.
    """

    coverage: float = 0.95
    row_share: float = 0.05
    window_share: float = 0.08
    max_window: int = 16384
    max_columns: int = 4096

    name: ClassVar[str] = "sample_attention"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    estimator: ClassVar[Estimator] = SAMPLE_ATTENTION

    def __post_init__(self) -> None:
        check_positive(self)
        check_share(self, "coverage", "row_share", "window_share")

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        rules = [p.rule() for p in patterns]
        columns = sample_attention_columns(inputs, rules)
        query, key, mask = inputs.query, inputs.key, inputs.mask
        windows = [window_size(rule, key.shape[2]) for rule in rules]
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        distance = positions[:, None] - torch.arange(key.shape[2], device=key.device)
        window = torch.stack([distance < size for size in windows])
        return (columns[:, :, None, :] | window) & allowed_cells(mask, positions, key.shape[2])

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.window())

    def window(self) -> sympy.Expr:
        """Nearest keys that are kept, in LENGTH."""
        return sympy.Min(self.window_share * LENGTH, self.max_window) + BLOCK

    def cost(self) -> sympy.Expr:
        """An upper bound: how many columns hold `coverage` is the prompt's matter."""
        estimation = self.row_share * LENGTH**2 / 2 * HEAD_DIM
        kept = causal_keys(self.window() + self.max_columns)
        return estimation + 2 * LENGTH * kept * HEAD_DIM


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(SampleAttention())


if __name__ == "__main__":
    main()
