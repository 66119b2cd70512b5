"""Tri-shape: first keys, a local window, and dense last rows, whatever the input.

MInference's repository names the pattern, and TriangleMix (arXiv 2507.21526) uses it for its deep
layers. A-shape leaves out what the question at the prompt's end looks for; here the last queries
see everything. Nothing is estimated.
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
    ALL_BLOCKS,
    BLOCK,
    IndexWidth,
    SparseIndex,
    empty_index,
    list_slots,
    num_key_blocks,
    window_diagonals,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import allowed_cells
from mpass.lowering.reference.block_lists import last_query
from mpass.patterns.base import (
    HEAD_DIM,
    LENGTH,
    Pattern,
    causal_keys,
    check_positive,
    register_pattern,
)
from mpass.patterns.base.sink_keys import list_sinks, sink_columns


@register_pattern
@dataclass(frozen=True)
class TriShape(Pattern):
    """Keep the first `sink_size` keys and the nearest `window_size`; the last queries keep all.

    The defaults are those that TriangleMix publishes. Without causality the window reaches as far
    ahead of the query as back.

    sink_size: Every query sees this many of the first keys. 0 keeps none of them.
    window_size: A query sees this many of the nearest keys, its own included.
    last_size: This many queries at the prompt's end see every key, at any length.
    """

    sink_size: int = 8
    window_size: int = 512
    last_size: int = 128

    name: ClassVar[str] = "tri_shape"
    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    fixed_budget: ClassVar[bool] = True
    input_independent: ClassVar[bool] = True
    bidirectional: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_positive(self, sink_size=True, last_size=True)

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        query, key, mask = inputs.query, inputs.key, inputs.mask
        width, rows, first_block = cls.width(patterns), inputs.num_blocks, inputs.first_block
        index = empty_index(query, rows, width, list_slots(len(inputs.heads)))
        blocks = torch.arange(first_block, first_block + rows, device=query.device)
        first_seen = torch.zeros_like(blocks)
        if mask.window > 0:
            first_seen = (blocks - (mask.window - 2 + BLOCK) // BLOCK).clamp(min=0)
        num_blocks = num_key_blocks(key.shape[2])
        stop = blocks.clamp(max=num_blocks - 1) + 1
        last = last_query(mask, query.shape[0], query.shape[2], query.device)[:, None]
        places = torch.arange(width.max_blocks, device=query.device)
        position = 0
        for pattern, run in itertools.groupby(patterns):
            own = slice(position, position := position + len(list(run)))
            starts = blocks * BLOCK
            whole = (starts + BLOCK > last + 1 - pattern.last_size) & (starts <= last)
            near = torch.maximum(first_seen, blocks - window_diagonals(pattern.window_size) + 1)
            first = torch.where(whole, first_seen, near)
            end = stop
            if not mask.causal:
                ahead = (blocks + window_diagonals(pattern.window_size)).clamp(max=num_blocks)
                end = torch.where(whole, num_blocks, ahead)
            counts = (end - first).clamp(min=0)
            full = counts > width.max_blocks
            live = (places < counts[..., None]) & ~full[..., None]
            entries = torch.where(live, first[..., None] + places, 0)
            index.block_count[:, own] = counts.masked_fill(full, ALL_BLOCKS)[:, None]
            index.block_index[:, own] = entries[:, None]
            list_sinks(index, own, key, mask, pattern.sink_size)
        return index

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return IndexWidth(
            # As many blocks ahead, where attention is not causal.
            max_blocks=max(2 * window_diagonals(p.window_size) - 1 for p in patterns),
            max_columns=max(p.sink_size for p in patterns),
        )

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        query, key, mask = inputs.query, inputs.key, inputs.mask
        positions = torch.arange(query.shape[2], device=query.device) + mask.query_offset
        distance = positions[:, None] - torch.arange(key.shape[2], device=key.device)
        last = last_query(mask, query.shape[0], query.shape[2], query.device)[:, None]
        sinks = sink_columns(key, mask, query.shape[0], [p.sink_size for p in patterns])
        per_head = []
        for i, p in enumerate(patterns):
            at_end = (positions > last - p.last_size) & (positions <= last)
            near = (distance if mask.causal else distance.abs()) < p.window_size
            per_head.append(near | at_end[..., None] | sinks[:, i, None, :])
        return torch.stack(per_head, 1) & allowed_cells(mask, positions, key.shape[2])

    def min_keys(self) -> sympy.Expr:
        kept = causal_keys(self.sink_size + self.window_size + BLOCK) + self.last_size
        return sympy.Min(LENGTH / 2, kept)

    def cost(self) -> sympy.Expr:
        return 2 * LENGTH * self.min_keys() * HEAD_DIM

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        return cls(3, 40, 70), cls(0, 1, 0)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        return (f"tri_shape(8, {length // 4})",)

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        return {cls.name: lambda x: cls(window_size=max(64, int(length * x)))}


if __name__ == "__main__":
    TriShape.main()
