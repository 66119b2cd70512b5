"""What a sparse pattern is: the parameters of one head, and a rule for many heads at once.

Letters: B batch, h heads of the pattern, H query heads, Hk kv heads, Nq queries, Nk keys, D
head_dim.
"""

from __future__ import annotations

import dataclasses
import html
import itertools
import math
from collections.abc import Callable, Sequence
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


Lost = Literal["spread", "vertical", "slash"]
"""Where the attention lies that a head loses: at a few keys (vertical), at a few distances between
query and key (slash), or spread over many of both."""


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Base of all patterns: parameters of one head, and the class's rule for many heads at once.

    name: as in options and files, also the op's; form: how it selects blocks (lowering/index.py);
    bidirectional: whether it is defined without a causal mask; fixed_budget: whether the parameters
    alone say how many keys are kept; input_independent: whether they say which ones, so that heads
    with the same parameters look at the same keys; required: what a subclass must define. Fields
    are int, float, bool or a Literal (mpass.patterns.base.parameters); every one has a default. The
    methods at the end tell what tools do with a pattern, and may be left out.
    """

    name: ClassVar[str] = ""
    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    bidirectional: ClassVar[bool] = False
    fixed_budget: ClassVar[bool] = False
    input_independent: ClassVar[bool] = False
    required: ClassVar[tuple[str, ...]] = ("estimate", "width", "select", "cost")

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        keep_old_names(cls)
        keep_old_calls(cls)

    def _repr_html_(self) -> str:
        """For notebooks: the name, what it keeps, and its parameters."""
        fields = "".join(
            f"<tr><td>{field.name}</td><td>{html.escape(repr(getattr(self, field.name)))}</td></tr>"
            for field in dataclasses.fields(self)
        )
        kept = html.escape((type(self).__doc__ or "").strip().split("\n")[0])
        return f"<p><b>{html.escape(self.name)}</b>: {kept}</p><table>{fields}</table>"

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

    def per_kv_head(self) -> bool:
        """Whether the query heads of a kv head that have this pattern select together."""
        return False

    def min_keys(self) -> sympy.Expr:
        """Keys per query that are computed whatever the input, averaged over a causal prompt.

        All of them if `fixed_budget`. In LENGTH; decides before estimation where dense is cheaper.
        """
        return causal_keys(BLOCK)

    def min_density(self, length: int) -> float:
        """`min_keys` over those of dense attention, for a prompt of `length` tokens."""
        return min(1.0, float(self.min_keys().subs(LENGTH, length)) / (length / 2))

    def usual_density(self, length: int) -> float:
        """The density that prompts of `length` tokens were seen to have, or may be expected to.

        It decides where sparse attention is taken on devices whose answers the host does not wait
        for: better too large than too small. By default a fixed budget's own, else half of the
        cells or more.
        """
        least = self.min_density(length)
        return least if self.fixed_budget else max(least, 0.5)

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

    def parameters(self) -> dict[str, int | float | bool | str]:
        """Field names and values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        values = ", ".join(repr(value) for value in self.parameters().values())
        return f"{self.name}({values})"

    def in_words(self) -> str:
        """The fields that differ from their defaults, by name: `union(mass=0.9)`, or `union`."""
        plain = type(self)().parameters()
        given = [f"{k}={v!r}" for k, v in self.parameters().items() if v != plain[k]]
        return f"{self.name}({', '.join(given)})" if given else self.name

    # What tools do with a pattern. A subclass may leave all of these out.

    @classmethod
    def examples(cls) -> tuple[Self, ...]:
        """Small instances, which tests run.

        The first one has to leave something out of a prompt of 400 tokens.
        """
        return (cls(),)

    @classmethod
    def candidates(cls) -> tuple[Self, ...]:
        """The instances that a calibration tries if it is not told which: the default one."""
        return (cls(),)

    @classmethod
    def sweep(cls, length: int) -> tuple[str, ...]:
        """The settings that benchmarks/frontier.py measures on a prompt of `length` tokens.

        They should range from about 5% to 60% dense, the sparsest first, and hold what is
        published. Each is written as the command line takes it: `name`, or `name(field=1)`.
        """
        return (cls.name,)

    @classmethod
    def knobs(cls, length: int) -> dict[str, Callable[[float], Self]]:
        """The pattern at a given cost, for benchmarks/calibration on prompts of `length` tokens.

        The keys name the ways in which it can be made dearer; each value makes the instance for a
        number from 0 (the cheapest) to 1 (nearly every key). By default there is no such way, and
        the default instance is what is compared.
        """
        return {cls.name: lambda x: cls()}

    @classmethod
    def budget_hint(cls, lost: Lost) -> str:
        """How this pattern keeps more of the attention that a head loses: "a larger top_k".

        It is "" where no parameter helps: the advice names another pattern then.
        """
        return "" if lost == "spread" else "a larger budget"

    @classmethod
    def main(cls) -> None:
        """What the pattern's file does when it is run: draw the default instance.

        The picture goes to the terminal, or into the SVG that the command line names.
        """
        from mpass.inspection.draw import draw_main

        draw_main(cls())


keep_old_names(Pattern)
keep_old_calls(Pattern)


def between(seen: Sequence[tuple[int, float]], length: float) -> float:
    """A density at any length from those that were seen: (tokens, density), ascending.

    On straight lines of logarithms; after the last length it falls half as steeply as before it.
    """
    if length <= seen[0][0]:
        return seen[0][1]
    pairs = list(itertools.pairwise(seen))
    (n1, d1), (n2, d2) = next((pair for pair in pairs if length <= pair[1][0]), pairs[-1])
    power = math.log(d2 / d1) / math.log(n2 / n1)
    if length > n2:
        return float(d2 * (length / n2) ** (power / 2))
    return float(d1 * (length / n1) ** power)


def causal_keys(count: sympy.Expr | int) -> sympy.Expr:
    """Keys per query, averaged over a causal prompt, if each sees `count` at most: LENGTH / 2 for
    all of them."""
    most = sympy.Min(LENGTH, count)
    return most - most**2 / (2 * LENGTH)
