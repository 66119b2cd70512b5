"""What a sparse pattern is: the parameters of one head, and a rule for many heads at once.

Letters: B batch, h heads of the pattern, H query heads, Hk kv heads, Nq queries, Nk keys, D
head_dim.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self

import sympy
from torch import Tensor

from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.patterns.base.aliases import keep_old_calls, keep_old_names

LENGTH, HEAD_DIM = sympy.symbols("N D", positive=True)
"""Symbols of `Pattern.cost`: sequence length and head_dim."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Base of all patterns: parameters of one head, and the class's rule for many heads at once.

    name: as in options and files, also the op's; form: how it selects blocks (lowering/index.py);
    bidirectional: whether it is defined without a causal mask; fixed_budget: whether the parameters
    alone say how many keys are kept; input_independent: whether they say which ones, so that heads
    with the same parameters look at the same keys. Fields are int, float or bool.
    """

    name: ClassVar[str] = ""
    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    bidirectional: ClassVar[bool] = False
    fixed_budget: ClassVar[bool] = False
    input_independent: ClassVar[bool] = False

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        keep_old_names(cls)
        keep_old_calls(cls)

    @classmethod
    def estimate(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> SparseIndex:
        """Which keys the heads look at on this input.

        patterns: the parameters of each of `inputs.heads`.
        """
        raise NotImplementedError

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        """Buffer sizes of `estimate`'s index, from the parameters alone."""
        raise NotImplementedError

    @classmethod
    def select(cls, inputs: EstimateInputs, patterns: Sequence[Self]) -> Tensor:
        """The cells that the rule selects: bool [B, h, Nq, Nk]. Small N only."""
        raise NotImplementedError

    def cost(self) -> sympy.Expr:
        """Multiply-adds of estimation and attention for one head, in LENGTH and HEAD_DIM."""
        raise NotImplementedError

    def min_keys(self) -> sympy.Expr:
        """Keys per query that are computed whatever the input, averaged over a causal prompt.

        All of them if `fixed_budget`. In LENGTH; decides before estimation where dense is cheaper.
        """
        return causal_keys(BLOCK)

    def min_density(self, length: int) -> float:
        """`min_keys` over those of dense attention, for a prompt of `length` tokens."""
        return min(1.0, float(self.min_keys().subs(LENGTH, length)) / (length / 2))

    def dense_mask(
        self,
        query: Tensor,
        key: Tensor,
        *,
        mask: AttentionMask | None = None,
        scale: float | None = None,
    ) -> Tensor:
        """The set that this pattern selects for every head: bool [B, H, Nq, Nk]. Small N only.

        query [B, H, Nq, D], key [B, Hk, Nk, D]; mask: causal over absolute positions by default.
        """
        heads = range(query.shape[1])
        mask = mask or AttentionMask(query_offset=key.shape[2] - query.shape[2])
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        inputs = EstimateInputs(query, key, mask, heads, scale)
        return type(self).select(inputs, [self] * len(heads))

    def parameters(self) -> dict[str, int | float | bool]:
        """Field names and values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        values = ", ".join(str(value) for value in self.parameters().values())
        return f"{self.name}({values})"


keep_old_names(Pattern)
keep_old_calls(Pattern)


def causal_keys(count: sympy.Expr | int) -> sympy.Expr:
    """Keys per query, averaged over a causal prompt, if each sees `count` at most: LENGTH / 2 for
    all of them."""
    most = sympy.Min(LENGTH, count)
    return most - most**2 / (2 * LENGTH)
