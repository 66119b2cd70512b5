"""Strided: a local window, and every `stride`-th token diagonal behind it, whatever the input.

With a `reach` as long as the prompt this is the strided pattern of Sparse Transformer (Child et
al., 2019, section 4.2); with a shorter one it is the dilated window of Longformer (Beltagy et al.,
2020, section 3.1). Strides are whole blocks, so that a kernel computes no more than what is
selected of each block diagonal. The first keys are kept on top, as StreamingLLM found models to
need. Nothing is estimated.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

import sympy
import torch
from torch import Tensor

from mpass.lowering.index import (
    BLOCK,
    IndexWidth,
    SparseIndex,
    window_diagonals,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import allowed_cells
from mpass.lowering.reference.vertical_slash import diagonal_index
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Pattern,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.checks import check_multiple
from mpass.patterns.base.sink_keys import sink_columns


@register_pattern
@dataclass(frozen=True)
class Strided(Pattern):
    """Keep the first keys, the nearest keys, and whole block diagonals at multiples of `stride`.

    sink_size: Every query sees this many of the first keys. 0 keeps none of them.
    window_size: A query sees this many of the nearest keys, its own included.
    stride: The block diagonals behind the window are this many tokens apart, a multiple of 64.
    reach: No block diagonal behind the window is further away than this many tokens.
    """

    sink_size: int = 64
    window_size: int = 512
    stride: int = 512
    reach: int = 32768

    name: ClassVar[str] = "strided"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    fixed_budget: ClassVar[bool] = True
    input_independent: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, sink_size=True)
        check_multiple(self, "stride")

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        query, key, mask = inputs.query, inputs.key, inputs.mask
        columns = sink_columns(key, mask, inputs.batch, [p.sink_size for p in patterns])
        length = max(p.last_diagonal() for p in patterns) + 1
        distances = torch.arange(length, device=key.device)
        kept = {p: p.diagonals(distances) for p in dict.fromkeys(patterns)}
        table = torch.stack([kept[p] for p in patterns])
        table = table.expand(query.shape[0], -1, -1)
        return diagonal_index(query, inputs.num_blocks, columns, table, cls.width(patterns))

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return IndexWidth(
            max_diagonals=max(
                window_diagonals(p.window_size) + p.reach // p.stride for p in patterns
            ),
            max_columns=max(p.sink_size for p in patterns),
        )

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        query, key, mask = inputs.query, inputs.key, inputs.mask
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        keys = torch.arange(key.shape[2], device=key.device)
        sinks = sink_columns(key, mask, query.shape[0], [p.sink_size for p in patterns])
        distance = positions[:, None] - keys
        blocks = positions[:, None] // BLOCK - keys // BLOCK
        per_head = [
            (distance < p.window_size)
            | ((blocks * BLOCK % p.stride == 0) & (blocks * BLOCK <= p.reach))
            for p in patterns
        ]
        allowed = allowed_cells(mask, positions, key.shape[2])
        return (torch.stack(per_head) | sinks[:, :, None, :]) & allowed

    def diagonals(self, distances: Tensor) -> Tensor:
        """Which of these block distances are kept."""
        on_stride = (distances * BLOCK % self.stride == 0) & (distances * BLOCK <= self.reach)
        return on_stride | (distances < window_diagonals(self.window_size))

    def last_diagonal(self) -> int:
        """The greatest block distance that is kept."""
        return max(window_diagonals(self.window_size) - 1, self.reach // BLOCK)

    def min_keys(self) -> sympy.Expr:
        window = self.sink_size + self.window_size + BLOCK
        behind = sympy.Max(0, causal_keys(self.reach) - causal_keys(window))
        return sympy.Min(LENGTH / 2, causal_keys(window) + behind * BLOCK / self.stride)

    def cost(self) -> sympy.Expr:
        return 2 * LENGTH * self.min_keys() * HEAD_DIM

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(3, 40, 192, 320), cls(0, 1, 64, 128)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return (f"strided(64, {length // 8}, {length // 8})",)

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(window_size=max(64, int(length * x)))}


if __name__ == "__main__":
    Strided.main()
