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

from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.reference import vertical_slash as estimate
from mpass.lowering.reference.attention import allowed_cells
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Pattern,
    causal_keys,
    check_positive,
    register_pattern,
)


@register_pattern
@dataclass(frozen=True)
class VerticalSlash(Pattern):
    """Keep `vertical_size` keys and `slash_size` token diagonals per head.

    Both are chosen by the attention of the last 64 queries. The first 30 keys and the 100 nearest
    diagonals are always kept and count towards the sizes, which are at least as large.
    """

    vertical_size: int = 1000
    slash_size: int = 1024

    name: ClassVar[str] = "vertical_slash"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"

    def __post_init__(self) -> None:
        check_positive(self)

    @classmethod
    def estimate(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        heads: Sequence[int],
        patterns: Sequence[Self],
        *,
        scale: float,
    ) -> SparseIndex:
        vertical_slash_index = choose_lowering(query, key, key).function("vertical_slash_index")
        index: SparseIndex = vertical_slash_index(
            query,
            key,
            mask,
            heads,
            scale=scale,
            vertical_sizes=[p.vertical_size for p in patterns],
            slash_sizes=[p.slash_size for p in patterns],
        )
        return index

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return estimate.vertical_slash_width(
            [p.vertical_size for p in patterns], [p.slash_size for p in patterns]
        )

    @classmethod
    def select(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        heads: Sequence[int],
        patterns: Sequence[Self],
        *,
        scale: float,
    ) -> Tensor:
        columns, diagonals = estimate.vertical_slash_selection(
            query,
            key,
            mask,
            heads,
            scale=scale,
            vertical_sizes=[p.vertical_size for p in patterns],
            slash_sizes=[p.slash_size for p in patterns],
        )
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        distance = positions[:, None] - torch.arange(key.shape[2], device=key.device)
        size = max(int(positions[-1]) + 1, key.shape[2])
        table = torch.nn.functional.pad(diagonals, (0, size - diagonals.shape[-1]))
        slashes = table[:, :, distance.clamp(min=0)] & (distance >= 0)
        return (columns[:, :, None, :] | slashes) & allowed_cells(mask, positions, key.shape[2])

    def fewest_keys(self) -> sympy.Expr:
        """The diagonals in as few blocks as can be: side by side."""
        return causal_keys(max(self.slash_size, estimate.LOCAL_DIAGONALS) + BLOCK)

    def cost(self) -> sympy.Expr:
        diagonals = sympy.Min(LENGTH / BLOCK, 2 * self.slash_size)
        estimation = estimate.LAST_QUERIES * LENGTH * HEAD_DIM
        kept = sympy.Min(LENGTH / 2, self.vertical_size + BLOCK * diagonals)
        return estimation + 2 * LENGTH * kept * HEAD_DIM


def main() -> None:
    """Draw the pattern, in the terminal or into the SVG that is named."""
    from mpass.inspection.draw import draw_main

    draw_main(VerticalSlash())


if __name__ == "__main__":
    main()
