"""Vertical-slash: the keys and the diagonals that the last queries attend to most.

MInference 1.0, sections 3.1 and 3.2, Algorithm 2; constants as in its released code.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import sympy
import torch
from torch import Tensor

from mpass.lowering.estimators import VERTICAL_SLASH, Estimator
from mpass.lowering.index import BLOCK
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import vertical_slash as estimate
from mpass.lowering.reference.attention import allowed_cells
from mpass.lowering.reference.selection import LAST_QUERIES
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.scored import EstimatedPattern


@register_pattern
@dataclass(frozen=True)
class VerticalSlash(EstimatedPattern):
    """Keep `vertical_size` keys and `slash_size` token diagonals per head.

    Both are chosen by the attention of the last 64 queries. The first 30 keys and the 100 nearest
    diagonals are always kept and count towards the sizes, which are at least as large.
    """

    vertical_size: int = 1000
    slash_size: int = 1024

    name: ClassVar[str] = "vertical_slash"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    estimator: ClassVar[Estimator] = VERTICAL_SLASH

    def __post_init__(self) -> None:
        check_positive(self)

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        rules = [pattern.rule() for pattern in patterns]
        columns, diagonals = estimate.vertical_slash_selection(inputs, rules)
        query, key, mask = inputs.query, inputs.key, inputs.mask
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        distance = positions[:, None] - torch.arange(key.shape[2], device=key.device)
        size = max(int(positions[-1]) + 1, key.shape[2])
        table = torch.nn.functional.pad(diagonals, (0, size - diagonals.shape[-1]))
        slashes = table[:, :, distance.clamp(min=0)] & (distance >= 0)
        return (columns[:, :, None, :] | slashes) & allowed_cells(mask, positions, key.shape[2])

    def min_keys(self) -> sympy.Expr:
        """The diagonals in as few blocks as can be: side by side."""
        return causal_keys(max(self.slash_size, estimate.LOCAL_DIAGONALS) + BLOCK)

    def cost(self) -> sympy.Expr:
        diagonals = sympy.Min(LENGTH / BLOCK, 2 * self.slash_size)
        estimation = LAST_QUERIES * LENGTH * HEAD_DIM
        kept = sympy.Min(LENGTH / 2, self.vertical_size + BLOCK * diagonals)
        return estimation + 2 * LENGTH * kept * HEAD_DIM


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(VerticalSlash())


if __name__ == "__main__":
    main()
