"""What patterns in list form share: the truth is what their index says, and how limits are checked.

No pattern of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import sympy
from mpass.lowering import reference
from mpass.lowering.index import BLOCK, AttentionMask, SparseIndex
from mpass.patterns.base import HEAD_DIM, LENGTH, Pattern
from torch import Tensor

from mpass.errors import PatternValueError


class ListPattern(Pattern):
    """Base of patterns that choose whole key blocks per query block by scores.

    A subclass gives `index`; what it selects is what the index computes, so `select` follows.
    """

    form: ClassVar[Literal["lists", "diagonals"]] = "lists"

    @classmethod
    def index(
        cls,
        query: Tensor,
        key: Tensor,
        mask: AttentionMask,
        heads: Sequence[int],
        patterns: Sequence[Self],
        *,
        scale: float,
    ) -> SparseIndex:
        """The index in plain torch; arguments as of `estimate`."""
        raise NotImplementedError

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
        return cls.index(query, key, mask, heads, patterns, scale=scale)

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
        index = cls.index(query, key, mask, heads, patterns, scale=scale)
        return reference.computed_mask(
            index, mask, batch=query.shape[0], num_queries=query.shape[2], num_keys=key.shape[2]
        )


def attention_cost(max_blocks: int, columns: int = 0) -> sympy.Expr:
    """Multiply-adds of attention to at most `max_blocks` blocks and `columns` keys: a bound."""
    return 2 * LENGTH * sympy.Min(LENGTH / 2, max_blocks * BLOCK + columns) * HEAD_DIM


def check_share(pattern: Pattern, *fields: str) -> None:
    """Raise PatternValueError unless these fields are numbers above 0 and up to 1."""
    for field in fields:
        value = getattr(pattern, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise PatternValueError(pattern.name, field, value, "a share, above 0 and up to 1")


def check_multiple(pattern: Pattern, field: str) -> None:
    """Raise PatternValueError unless the field is a multiple of BLOCK."""
    value = getattr(pattern, field)
    if value % BLOCK:
        raise PatternValueError(pattern.name, field, value, f"a multiple of {BLOCK}")


def check_divisor(pattern: Pattern, *fields: str) -> None:
    """Raise PatternValueError unless these fields divide BLOCK."""
    for field in fields:
        value = getattr(pattern, field)
        if BLOCK % value:
            raise PatternValueError(pattern.name, field, value, f"a divisor of {BLOCK}")


def check_room(pattern: Pattern, forced_blocks: int, max_blocks: int) -> None:
    """Raise PatternValueError unless the blocks that are always kept fit into the lists."""
    if max_blocks < forced_blocks:
        allowed = f"{forced_blocks} or more, to hold the first and nearest blocks"
        raise PatternValueError(pattern.name, "max_blocks", max_blocks, allowed)
