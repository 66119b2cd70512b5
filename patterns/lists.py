"""What patterns in list form share: the truth is what their index says, and how limits are checked.

No pattern of its own.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, Self

import sympy
from mpass.lowering import reference
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import BLOCK, AttentionMask, IndexWidth, SparseIndex
from mpass.patterns.base import HEAD_DIM, LENGTH, Pattern, causal_keys, check_positive
from torch import Tensor

from mpass.errors import PatternValueError


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


def forced_blocks(pattern: Pattern) -> int:
    """Blocks of BLOCK keys that are kept whatever their scores: the first and the nearest ones."""
    kept = getattr(pattern, "sink_blocks", 0) + getattr(pattern, "local_blocks", 1)
    return int(kept * getattr(pattern, "block_size", BLOCK)) // BLOCK


def check_blocks(pattern: ListPattern) -> None:
    """Raise PatternValueError unless numbers of blocks are in range and the forced ones have room.

    Fields: sink_blocks, last_blocks and columns may be 0; block_size is a multiple of BLOCK.
    """
    check_positive(pattern, sink_blocks=True, last_blocks=True, columns=True)
    if hasattr(pattern, "block_size"):
        check_multiple(pattern, "block_size")
    check_room(pattern, forced_blocks(pattern), pattern.parameters()["max_blocks"])


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


def check_room(pattern: Pattern, forced_blocks: float, max_blocks: float) -> None:
    """Raise PatternValueError unless the blocks that are always kept fit into the lists."""
    if max_blocks < forced_blocks:
        allowed = f"{forced_blocks} or more, to hold the first and nearest blocks"
        raise PatternValueError(pattern.name, "max_blocks", max_blocks, allowed)
