"""SampleAttention: a local window in proportion to the prompt, and columns by coverage.

The rule is SampleAttention's (Zhu et al., arXiv 2406.15486), section 4, with its published shares.
5% of the queries, evenly spaced, attend to everything; the fewest columns that hold 95% of what
they attend to are kept, and so are the nearest 8% of the prompt for every query. The number of
columns adapts to head and prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    Lost,
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

    Without causality the nearest keys are those behind a query and as many ahead.

    coverage: The kept columns hold this part of the sampled attention. A larger coverage keeps
        more.
    row_share: This part of the queries is sampled.
    window_share: Every query sees this part of the prompt, the nearest keys.
    max_window: The nearest keys are at most this many, whatever `window_share` of the prompt is.
    max_columns: A head keeps at most this many columns, and the strongest where this binds.
    """

    coverage: float = 0.95
    row_share: float = 0.05
    window_share: float = 0.08
    max_window: int = 16384
    max_columns: int = 4096

    name: ClassVar[str] = "sample_attention"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    estimator: ClassVar[Estimator] = SAMPLE_ATTENTION
    bidirectional: ClassVar[bool] = True
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 0.65),
        (2048, 0.575),
        (8192, 0.545),
        (32768, 0.34),
    )

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
        distance = distance if mask.causal else distance.abs()
        window = torch.stack([distance < size for size in windows])
        return (columns[:, :, None, :] | window) & allowed_cells(mask, positions, key.shape[2])

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.window())

    def window(self) -> sympy.Expr:
        """Nearest keys that are kept, in LENGTH."""
        return sympy.Min(self.window_share * LENGTH, self.max_window) + BLOCK

    def denser(self) -> float:
        return float((0.05 / (1.0001 - self.coverage)) ** 0.3)

    def cost(self) -> sympy.Expr:
        """This is an upper bound: how many columns hold `coverage` depends on the prompt."""
        estimation = self.row_share * LENGTH**2 / 2 * HEAD_DIM
        kept = causal_keys(self.window() + self.max_columns)
        return estimation + 2 * LENGTH * kept * HEAD_DIM

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(0.5, 0.1, 0.1), cls(0.9, 1.0, 0.01, 9, 7)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return tuple(f"sample_attention(coverage={x})" for x in (0.9, 0.95))

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(coverage=0.05 + 0.945 * x, window_share=0.005 + 0.08 * x)}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "a larger coverage"


if __name__ == "__main__":
    SampleAttention.main()
