"""Vertical-slash: the keys and the diagonals that the last queries attend to most.

The rule is that of MInference 1.0, sections 3.1 and 3.2, Algorithm 2; constants are those of its
released code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
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
    Lost,
    between,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.scored import EstimatedPattern

TABLE_7 = ((30, 2048), (100, 1800), (500, 1500), (3000, 200))
"""Sizes of the search space of MInference's paper (arXiv 2407.02490, Table 7)."""

RELEASED = ((30, 800), (100, 800), (500, 700), (1000, 1024), (3500, 100), (1000, 6096))
"""Sizes that MInference's released code and files name."""


@register_pattern
@dataclass(frozen=True)
class VerticalSlash(EstimatedPattern):
    """Keep `vertical_size` keys and `slash_size` token diagonals per head.

    Both are chosen by the attention of the last 64 queries. The first 30 keys and the 100 nearest
    diagonals are always kept and count towards the sizes, which are at least as large.

    vertical_size: Every query of a head sees this many keys, the same ones.
    slash_size: Every query of a head sees the keys at this many distances, the same ones.
    """

    vertical_size: int = 1000
    slash_size: int = 1024

    name: ClassVar[str] = "vertical_slash"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    estimator: ClassVar[Estimator] = VERTICAL_SLASH
    seen: ClassVar[tuple[tuple[int, float], ...]] = (
        (1024, 1.0),
        (2048, 0.968),
        (4096, 0.838),
        (8192, 0.587),
        (32768, 0.357),
    )

    def __post_init__(self) -> None:
        check_positive(self)

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        rules = [pattern.rule() for pattern in patterns]
        columns, diagonals = estimate.vertical_slash_selection(inputs, rules)
        query, key, mask = inputs.query, inputs.key, inputs.mask
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        distance = positions[:, None] - torch.arange(key.shape[2], device=key.device)
        size = max(query.shape[2] + mask.query_offset, key.shape[2])
        table = torch.nn.functional.pad(diagonals, (0, size - diagonals.shape[-1]))
        slashes = table[:, :, distance.clamp(min=0)] & (distance >= 0)
        return (columns[:, :, None, :] | slashes) & allowed_cells(mask, positions, key.shape[2])

    def usual_density(self, length: int) -> float:
        """Diagonals spread over blocks: their number over the length is what counts."""
        scaled = between(self.seen, length * 1024 / self.slash_size)
        columns = min(1.0, self.vertical_size / length)
        return min(1.0, max(self.min_density(length), scaled + max(0.0, columns - 1024 / length)))

    def min_keys(self) -> sympy.Expr:
        """The diagonals in as few blocks as can be: side by side."""
        return causal_keys(max(self.slash_size, estimate.LOCAL_DIAGONALS) + BLOCK)

    def cost(self) -> sympy.Expr:
        diagonals = sympy.Min(LENGTH / BLOCK, 2 * self.slash_size)
        estimation = LAST_QUERIES * LENGTH * HEAD_DIM
        kept = sympy.Min(LENGTH / 2, self.vertical_size + BLOCK * diagonals)
        return estimation + 2 * LENGTH * kept * HEAD_DIM

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(20, 64), cls(40, 110), cls(1, 1)

    @classmethod
    def candidates(cls) -> tuple[Self, ...]:
        return tuple(cls(*sizes) for sizes in (*TABLE_7, *RELEASED))

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        sizes = [length // part for part in (128, 64, 32, 16, 8)]
        return tuple(f"vertical_slash({size}, {size})" for size in sizes)

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        """MInference's (1000, 6096), both numbers cut alike."""
        return {cls.name: lambda x: cls(max(1, int(1000 * x)), max(1, int(6096 * x)))}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        return "" if lost == "spread" else f"a larger {lost} budget"


if __name__ == "__main__":
    VerticalSlash.main()
