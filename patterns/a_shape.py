"""A-shape: the first keys (sinks) and a local window, whatever the input.

The pattern is that of MInference 1.0, section 3.1, and its mask is StreamingLLM's. Nothing is
estimated.
"""

from __future__ import annotations

import itertools
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
    diagonal_slots,
    empty_index,
    window_diagonals,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import allowed_cells
from mpass.lowering.reference.selection import first_keys
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Lost,
    Pattern,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.sink_keys import list_sinks


@register_pattern
@dataclass(frozen=True)
class AShape(Pattern):
    """Keep the first `sink_size` keys and the `window_size` keys up to the query's own.

    Padding does not count: the sinks are the first real keys of a batch row. Without causality the
    window reaches as far ahead of the query as back.

    sink_size: Every query sees this many of the first keys. 0 keeps none of them.
    window_size: A query sees this many of the nearest keys, its own included.
    """

    sink_size: int = 128
    window_size: int = 1024

    name: ClassVar[str] = "a_shape"
    form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
    fixed_budget: ClassVar[bool] = True
    input_independent: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, sink_size=True)

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        key, width = inputs.key, cls.width(patterns)
        slots = diagonal_slots(len(inputs.heads))
        index = empty_index(inputs.query, inputs.num_blocks, width, slots)
        distances = torch.arange(width.max_diagonals, dtype=torch.int32, device=key.device)
        first = 0
        for pattern, run in itertools.groupby(patterns):
            own = slice(first, first := first + len(list(run)))
            reach = window_diagonals(pattern.window_size)
            ahead = 0 if inputs.mask.causal else reach - 1
            index.diagonal_count[:, own].fill_(reach + ahead)
            live = distances < reach + ahead
            shown = distances - ahead if ahead else distances
            index.diagonal_index[:, own] = torch.where(live, shown, 0)
            list_sinks(index, own, key, inputs.mask, pattern.sink_size)
        return index

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return IndexWidth(
            # As many blocks ahead, where attention is not causal.
            max_diagonals=max(2 * window_diagonals(p.window_size) - 1 for p in patterns),
            max_columns=max(p.sink_size for p in patterns),
        )

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        query, key, mask = inputs.query, inputs.key, inputs.mask
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        keys = torch.arange(key.shape[2], device=key.device)
        start = first_keys(mask, query.shape[0], key.device)[:, None]
        per_head = []
        for pattern in patterns:
            distance = positions[:, None] - keys
            window = (distance if mask.causal else distance.abs()) < pattern.window_size
            sinks = (keys - start >= 0) & (keys - start < pattern.sink_size)
            per_head.append(window | sinks[:, None, :])
        return torch.stack(per_head, 1) & allowed_cells(mask, positions, key.shape[2])

    def min_keys(self) -> sympy.Expr:
        return causal_keys(self.sink_size + self.window_size + BLOCK)

    def cost(self) -> sympy.Expr:
        return 2 * LENGTH * self.min_keys() * HEAD_DIM

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(sink_size=3, window_size=40), cls(0, 1)

    @classmethod
    def candidates(cls) -> tuple[Self, ...]:
        """Table 7 of MInference's paper (arXiv 2407.02490), and two cheaper ones."""
        return cls(1024, 4096), cls(64, 256), cls(128, 1024)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return (f"a_shape(128, {length // 4})",)

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(window_size=max(64, int(length * x)))}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        """What lies behind the window is found by a pattern that looks for it."""
        return ""


if __name__ == "__main__":
    AShape.main()
