"""What a sparse pattern is, and the registry of all of them.

A pattern is one file here: a frozen dataclass with its parameters, `estimate` (which keys matter on
this input), `select` (the same set, cell by cell: the truth), `cost` (sympy) and a `main` that
draws it. Registering it defines its op `minference::<name>`, whose arguments are the dataclass's
fields, one value per head. Files of this folder and the modules named by entry points of the group
`mpass.patterns` are found by `discover_patterns`.

Letters: B batch, h heads of the pattern, H query heads, Hk kv heads, Nq queries, Nk keys, D
head_dim.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, Self, TypeVar

import sympy
import torch
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    list_slots,
    num_query_blocks,
    whole_index,
)
from mpass.lowering.ops import NAMESPACE, IndexTensors
from mpass.lowering.record import note_dense
from mpass.patterns.choice import HeadPatterns, reason_for_dense
from torch import Tensor

from mpass.errors import PatternValueError, UnknownPatternError

ENTRY_POINTS = "mpass.patterns"
"""Entry-point group of packages that bring patterns of their own; each names a module."""

LENGTH, HEAD_DIM = sympy.symbols("N D", positive=True)
"""Symbols of `Pattern.cost`: sequence length and head_dim."""

_registry: dict[str, type[Pattern]] = {}


@dataclasses.dataclass(frozen=True)
class Pattern:
    """Base of all patterns: parameters of one head, and the class's rule for many heads at once.

    name: as in options and files, also the op's; form: how it selects blocks (lowering/index.py);
    bidirectional: whether it is defined without a causal mask; budgeted: whether the parameters
    alone say how many keys are kept; static: whether they say which ones, whatever the input, so
    that heads with the same parameters look at the same keys. Fields are int, float or bool.
    """

    name: ClassVar[str] = ""
    form: ClassVar[Literal["lists", "diagonals"]] = "lists"
    bidirectional: ClassVar[bool] = False
    budgeted: ClassVar[bool] = False
    static: ClassVar[bool] = False

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
        """Which keys the heads look at on this input.

        query [B, H, Nq, D], key [B, Hk, Nk, D]; patterns: the parameters of each of `heads`.
        """
        raise NotImplementedError

    @classmethod
    def width(cls, patterns: Sequence[Self]) -> IndexWidth:
        """Buffer sizes of `estimate`'s index, from the parameters alone."""
        raise NotImplementedError

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
        """The cells that the rule selects: bool [B, h, Nq, Nk]. Small N only."""
        raise NotImplementedError

    def cost(self) -> sympy.Expr:
        """Multiply-adds of estimation and attention for one head, in LENGTH and HEAD_DIM."""
        raise NotImplementedError

    def fewest_keys(self) -> sympy.Expr:
        """Keys per query that are computed whatever the input, averaged over a causal prompt.

        All of them if `budgeted`. In LENGTH; decides before estimation where dense is cheaper.
        """
        return causal_keys(BLOCK)

    def least_share(self, length: int) -> float:
        """`fewest_keys` over those of dense attention, for a prompt of `length` tokens."""
        return min(1.0, float(self.fewest_keys().subs(LENGTH, length)) / (length / 2))

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
        return type(self).select(
            query,
            key,
            mask or AttentionMask(query_offset=key.shape[2] - query.shape[2]),
            heads,
            [self] * len(heads),
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
        )

    def parameters(self) -> dict[str, int | float | bool]:
        """Field names and values."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}

    def __str__(self) -> str:
        values = ", ".join(str(value) for value in self.parameters().values())
        return f"{self.name}({values})"


def causal_keys(count: sympy.Expr | int) -> sympy.Expr:
    """Keys per query, averaged over a causal prompt, if each sees `count` at most: LENGTH / 2 for
    all of them."""
    most = sympy.Min(LENGTH, count)
    return most - most**2 / (2 * LENGTH)


P = TypeVar("P", bound=Pattern)


def register_pattern(cls: type[P]) -> type[P]:
    """Add a pattern to the registry and define its op `minference::<name>`; a class decorator."""
    _registry[cls.name] = cls
    define_index_op(cls)
    return cls


def define_index_op(cls: type[Pattern]) -> None:
    """Define the op that runs `cls.estimate`: the pattern's fields as one list argument each.

    dense_above and min_seq_len are those of `minference::sparse_attention`. Where they say before
    anything is estimated that dense attention will run, nothing is: the index selects every key.
    """
    kinds = {"int": "int[]", "float": "float[]", "bool": "bool[]"}
    fields = dataclasses.fields(cls)
    arguments = "".join(f", {kinds[str(field.type)]} {field.name}" for field in fields)
    schema = (
        "(Tensor query, Tensor key, Tensor? key_mask, int[] heads, SymInt query_offset, "
        "int window, bool causal, float scale, float dense_above, "
        f"SymInt min_seq_len{arguments}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
    )

    def estimate(
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None,
        heads: Sequence[int],
        query_offset: int,
        window: int,
        causal: bool,
        scale: float,
        dense_above: float,
        min_seq_len: int,
        *parameters: Sequence[Any],
    ) -> IndexTensors:
        own = patterns_of(cls, len(heads), tuple(map(tuple, parameters)))  # type: ignore[arg-type]
        mask = AttentionMask(causal, query_offset, window, key_mask)
        reason = reason_for_dense(
            query, key, mask, own, dense_above=dense_above, min_seq_len=min_seq_len
        )
        if reason:
            note_dense(reason)
            rows = num_query_blocks(query.shape[2], query_offset)
            slots = head_slots(cls, len(heads))
            return whole_index(query, rows, own.width, slots).tensors()
        return cls.estimate(query, key, mask, heads, own.patterns, scale=scale).tensors()

    def fake(
        query: Tensor,
        key: Tensor,
        key_mask: Tensor | None,
        heads: Sequence[int],
        query_offset: int,
        window: int,
        causal: bool,
        scale: float,
        dense_above: float,
        min_seq_len: int,
        *parameters: Sequence[Any],
    ) -> IndexTensors:
        own = patterns_of(cls, len(heads), tuple(map(tuple, parameters)))  # type: ignore[arg-type]
        rows = num_query_blocks(query.shape[2], query_offset)
        return empty_index(query, rows, own.width, head_slots(cls, len(heads))).tensors()

    op = torch.library.custom_op(
        f"{NAMESPACE}::{cls.name}", estimate, mutates_args=(), schema=schema
    )
    op.register_fake(fake)


@functools.lru_cache(maxsize=4096)
def patterns_of(
    cls: type[Pattern], num_heads: int, parameters: tuple[tuple[Any, ...], ...]
) -> HeadPatterns:
    """The pattern of each head from its op's arguments: per field, one value per head."""
    patterns = [cls(*values) for values in zip(*parameters, strict=True)] or [cls()] * num_heads
    return HeadPatterns(tuple(patterns), cls.width(patterns))


def index_op(cls: type[Pattern]) -> torch._ops.OpOverload:
    """The registered op of a pattern."""
    op: torch._ops.OpOverload = getattr(torch.ops.minference, cls.name).default
    return op


def head_slots(cls: type[Pattern], num_heads: int) -> tuple[int, ...]:
    """`head_slots` of an index that a pattern estimates for `num_heads` heads."""
    return list_slots(num_heads) if cls.form == "lists" else diagonal_slots(num_heads)


def shared_slots(patterns: Sequence[Pattern], slots: Sequence[int]) -> tuple[int, ...]:
    """`head_slots` in which heads of one static pattern all read the row of the first of them.

    patterns, slots: one per head. The rows are equal anyway; named by one number, a kernel can take
    several query heads of a kv head together.
    """
    first: dict[Pattern, int] = {}
    return tuple(
        first.setdefault(pattern, slot) if pattern.static else slot
        for pattern, slot in zip(patterns, slots, strict=True)
    )


@functools.cache
def discover_patterns() -> None:
    """Import every pattern: the files of this folder, then those that entry points name."""
    package = importlib.import_module("mpass.patterns")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "base":
            importlib.import_module(f"mpass.patterns.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def registered_patterns() -> dict[str, type[Pattern]]:
    """All patterns by name."""
    discover_patterns()
    return dict(_registry)


def find_pattern(name: str) -> type[Pattern]:
    """The pattern of that name; raises UnknownPatternError."""
    patterns = registered_patterns()
    if name not in patterns:
        raise UnknownPatternError(name, patterns)
    return patterns[name]


def check_positive(pattern: Pattern, **allow_zero: bool) -> None:
    """Raise PatternValueError unless the int fields are positive (or zero where allowed)."""
    for field in dataclasses.fields(pattern):
        value = getattr(pattern, field.name)
        if str(field.type) != "int":
            continue
        lowest = 0 if allow_zero.get(field.name) else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise PatternValueError(pattern.name, field.name, value, f"an int >= {lowest}")
