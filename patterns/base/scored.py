"""What patterns share that estimate by scores: how they find their estimator, and what it means.

No pattern of its own.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal, Self

import sympy
from torch import Tensor

from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.estimators import Estimator
from mpass.lowering.index import BLOCK, IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.patterns.base.aliases import takes_each, unpacked
from mpass.patterns.base.checks import forced_blocks
from mpass.patterns.base.kv_groups import (
    Turns,
    has_option,
    index_rows,
    merge_heads,
    spread_columns,
)
from mpass.patterns.base.pattern import HEAD_DIM, LENGTH, Pattern, between, causal_keys


class ListEstimator(Estimator):
    """An estimator as other packages make it: of functions that take their arguments one by one.

    index: (query, key, mask, heads, rules, *, scale) -> SparseIndex in plain torch, or (inputs,
    rules) as of `Estimator.reference`; width and rule: as of `Estimator`.
    """

    def __init__(
        self,
        index: Callable[..., SparseIndex],
        width: Callable[..., IndexWidth],
        rule: Callable[..., Any],
    ) -> None:
        def reference(inputs: EstimateInputs, rules: Sequence[Any]) -> SparseIndex:
            return index(*unpacked(inputs), rules, scale=inputs.scale)

        name = f"{index.__module__}.{index.__qualname__}"
        super().__init__(name, reference if takes_each(index) else index, width, rule)
        object.__setattr__(self, "index", index)  # the older name of `reference`


class EstimatedPattern(Pattern):
    """Base of patterns whose index an estimator finds, from one rule per head.

    A subclass has fields and an `estimator` of them.
    """

    required: ClassVar[tuple[str, ...]] = ("estimator", "select", "cost")
    estimator: ClassVar[Estimator]
    seen: ClassVar[tuple[tuple[int, float], ...]] = ()
    """Densities that prompts were seen to have with the default parameters: (tokens, density)."""

    def rule(self) -> Any:
        """The fields as the estimator takes them."""
        return self.estimator.rule(**self.numbers())

    def numbers(self) -> dict[str, Any]:
        """The fields that are the estimator's: all but `per`."""
        own = self.parameters()
        return {name: own[name] for name in own if name != "per" or not has_option(type(self))}

    def __str__(self) -> str:
        """The default of `per` is left out."""
        values = [repr(value) for value in self.numbers().values()]
        if has_option(type(self)) and self.parameters()["per"] != "head":
            values.append(f"per={self.parameters()['per']!r}")
        return f"{self.name}({', '.join(values)})"

    def denser(self) -> float:
        """How many times as much as `seen` these parameters keep, roughly."""
        return 1.0

    def usual_density(self, length: int) -> float:
        least = self.min_density(length)
        if not self.seen:
            return super().usual_density(length)
        return min(1.0, max(least, between(self.seen, length) * self.denser()))

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        estimate = choose_lowering(inputs.attention()).estimate(cls.estimator)
        return estimate(inputs, rules_of(tuple(patterns)))

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        return cls.estimator.width(rules_of(tuple(patterns)))


@functools.lru_cache(maxsize=4096)
def rules_of(patterns: tuple[EstimatedPattern, ...]) -> tuple[Any, ...]:
    """The rule of each pattern: the same heads ask in each call, while a GPU waits for its host."""
    return tuple(pattern.rule() for pattern in patterns)


class ListPattern(EstimatedPattern):
    """Base of patterns that choose whole key blocks per query block by scores.

    What a subclass selects is what the index in plain torch computes. With a field `per: Per` it
    can select once for the query heads of a kv head (mpass.patterns.base.kv_groups).
    """

    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    required: ClassVar[tuple[str, ...]] = ("estimator", "cost")

    def per_kv_head(self) -> bool:
        return getattr(self, "per", None) == "kv_head" and has_option(type(self))

    def turns(self) -> Turns:
        """How the heads of one row of the index take turns where the pattern is per kv head."""
        return Turns()

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        return shared_index(super().estimate, inputs, patterns)

    def min_keys(self) -> sympy.Expr:
        return causal_keys(forced_blocks(self) * BLOCK)

    def usual_density(self, length: int) -> float:
        most = getattr(self, "max_blocks", 0) * BLOCK + getattr(self, "columns", 0)
        keys = min(length, most) if most else length
        return min(super().usual_density(length), (keys - keys**2 / (2 * length)) / (length / 2))

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        def reference_index(merged: EstimateInputs, own: Sequence[Self]) -> SparseIndex:
            return cls.estimator.reference(merged, rules_of(tuple(own)))

        index = shared_index(reference_index, inputs, patterns)
        sizes = {"num_queries": inputs.num_queries, "num_keys": inputs.num_keys}
        return reference.computed_mask(index, inputs.mask, batch=inputs.batch, **sizes)


def shared_index(
    estimate: Callable[[EstimateInputs, Sequence[Any]], SparseIndex],
    inputs: EstimateInputs,
    patterns: Sequence[ListPattern],
) -> SparseIndex:
    """The index of some heads, in which those of one selection are estimated together."""
    rows = index_rows(patterns, inputs.heads, inputs.group)
    if len(set(rows)) == len(rows):
        return estimate(inputs, patterns)
    own = [patterns[rows.index(row)] for row in range(max(rows) + 1)]
    merged = merge_heads(inputs, rows, [pattern.turns() for pattern in own])
    return spread_columns(estimate(merged, own), rows)


def attention_cost(max_blocks: int, columns: int = 0) -> sympy.Expr:
    """Multiply-adds of attention to at most `max_blocks` blocks and `columns` keys: a bound."""
    return 2 * LENGTH * causal_keys(max_blocks * BLOCK + columns) * HEAD_DIM


def tile_cost(block_size: int) -> sympy.Expr:
    """Multiply-adds of means over blocks of keys and their products with every query."""
    return LENGTH * HEAD_DIM + LENGTH**2 / (2 * block_size) * HEAD_DIM
