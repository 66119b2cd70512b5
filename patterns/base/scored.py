"""What patterns in list form share: the truth is what their index says, and how limits are checked.

No pattern of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import sympy
from torch import Tensor

from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.reference import attention as reference
from mpass.patterns.base.checks import forced_blocks
from mpass.patterns.base.pattern import HEAD_DIM, LENGTH, Pattern, causal_keys


@dataclass(frozen=True, slots=True)
class ListEstimator:
    """How a pattern gets its lists: functions of one rule per head.

    index: (query, key, mask, heads, rules, *, scale) -> SparseIndex in plain torch, the meaning; a
    lowering's own function of the same name is it for its device. width: rules -> IndexWidth.
    rule: makes a rule of a pattern's fields.
    """

    index: Callable[..., SparseIndex]
    width: Callable[..., IndexWidth]
    rule: Callable[..., Any]


class ListPattern(Pattern):
    """Base of patterns that choose whole key blocks per query block by scores.

    A subclass has fields and an `estimator` of them; what it selects is what the index in plain
    torch computes.
    """

    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    estimator: ClassVar[ListEstimator]

    def rule(self) -> Any:
        """The fields as the estimator takes them."""
        return self.estimator.rule(**self.parameters())

    def fewest_keys(self) -> sympy.Expr:
        return causal_keys(forced_blocks(self) * BLOCK)

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
        rules = [p.rule() for p in patterns]
        plain = cls.estimator.index
        own = plain
        if plain.__module__.startswith("mpass.lowering."):  # others' functions are their own
            lowering = choose_lowering(query, key, key)
            module = importlib.import_module(f"mpass.lowering.{lowering.name}")
            own = getattr(module, plain.__name__, plain)
        index: SparseIndex = own(query, key, mask, heads, rules, scale=scale)
        return index

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return cls.estimator.width([p.rule() for p in patterns])

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
        rules = [p.rule() for p in patterns]
        index = cls.estimator.index(query, key, mask, heads, rules, scale=scale)
        return reference.computed_mask(
            index, mask, batch=query.shape[0], num_queries=query.shape[2], num_keys=key.shape[2]
        )


def attention_cost(max_blocks: int, columns: int = 0) -> sympy.Expr:
    """Multiply-adds of attention to at most `max_blocks` blocks and `columns` keys: a bound."""
    return 2 * LENGTH * causal_keys(max_blocks * BLOCK + columns) * HEAD_DIM


def tile_cost(block_size: int) -> sympy.Expr:
    """Multiply-adds of means over blocks of keys and their products with every query."""
    return LENGTH * HEAD_DIM + LENGTH**2 / (2 * block_size) * HEAD_DIM
