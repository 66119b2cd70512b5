"""Dense: every key that the mask allows. It is for heads that a config leaves as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import sympy
import torch
from torch import Tensor

from mpass.lowering.index import (
    ALL_DIAGONALS,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import allowed_cells
from mpass.patterns.base import HEAD_DIM, LENGTH, Pattern, register_pattern


@register_pattern
@dataclass(frozen=True)
class Dense(Pattern):
    """Keep every key that the mask allows.

    A layer that is dense in all heads is not rewritten at all, unless its mask is a sliding window:
    then only the window is computed.
    """

    name: ClassVar[str] = "dense"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    fixed_budget: ClassVar[bool] = True
    input_independent: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        slots = diagonal_slots(len(inputs.heads))
        index = empty_index(inputs.query, inputs.num_blocks, cls.width(patterns), slots)
        index.diagonal_count.fill_(ALL_DIAGONALS)
        return index

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return IndexWidth()

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        query, mask = inputs.query, inputs.mask
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        cells = allowed_cells(mask, positions, inputs.num_keys)
        return cells.expand(inputs.batch, len(inputs.heads), -1, -1).to(torch.bool)

    def min_keys(self) -> sympy.Expr:
        return LENGTH / 2

    def cost(self) -> sympy.Expr:
        return LENGTH**2 * HEAD_DIM

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        """There is nothing to compare: it is what the others are compared with."""
        return {}


if __name__ == "__main__":
    Dense.main()
