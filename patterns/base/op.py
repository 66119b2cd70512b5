"""The op of a pattern, `minference::<name>`: its fields are arguments, one value per head.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mpass.failures import contain
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.index import (
    AttentionMask,
    diagonal_slots,
    empty_index,
    num_query_blocks,
    whole_index,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.ops import IndexTensors
from mpass.lowering.recorder import note_dense
from mpass.patterns.base.crossover import HeadPatterns, reason_for_dense
from mpass.patterns.base.kv_groups import index_rows
from mpass.patterns.base.parameters import parameter_kinds
from mpass.patterns.base.pattern import Pattern


def define_index_op(cls: type[Pattern]) -> None:
    """Define the op that runs `cls.estimate`: the pattern's fields as one list argument each.

    dense_above, min_seq_len, site and distance_bias are those of `minference::sparse_attention`.
    Where they say before anything is estimated that dense attention will run, nothing is: the index
    selects every key.
    """
    kinds = parameter_kinds(cls)
    arguments = "".join(f", {kind.schema} {name}" for name, kind in kinds.items())
    schema = (
        "(Tensor query, Tensor key, Tensor? key_mask, int[] heads, SymInt query_offset, "
        "int window, bool causal, float scale, float dense_above, "
        f"SymInt min_seq_len{arguments}, int site=0, Tensor? distance_bias=None) "
        "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
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
        *parameters: Any,
    ) -> IndexTensors:
        parameters, site, bias = split_site(parameters, len(kinds))
        own = patterns_of(cls, len(heads), tuple(map(tuple, parameters)))  # type: ignore[arg-type]
        mask = AttentionMask(causal, query_offset, window, key_mask)
        inputs = EstimateInputs(query, key, mask, heads, scale, bias)
        try:
            reason = reason_for_dense(
                inputs, own, dense_above=dense_above, min_seq_len=min_seq_len, site=site
            )
            if not reason:
                return cls.estimate(inputs, own.patterns).tensors()
        except Exception as error:
            reason = contain(error, f"the estimation of {cls.name}")
        note_dense(reason)
        rows = num_query_blocks(query.shape[2], query_offset)
        slots = slots_of(own, tuple(heads), inputs.group)
        return whole_index(query, rows, own.width, slots).tensors()

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
        *parameters: Any,
    ) -> IndexTensors:
        parameters, _, _ = split_site(parameters, len(kinds))
        own = patterns_of(cls, len(heads), tuple(map(tuple, parameters)))  # type: ignore[arg-type]
        rows = num_query_blocks(query.shape[2], query_offset)
        slots = head_slots(own.patterns, heads, query.shape[1] // key.shape[1])
        return empty_index(query, rows, own.width, slots).tensors()

    define_op(cls.name, schema, chooses=True)(estimate)
    fake_of(cls.name)(fake)


def split_site(
    arguments: tuple[Any, ...], count: int
) -> tuple[tuple[Any, ...], int, Tensor | None]:
    """The `count` lists of parameters at the end of an op's arguments, the site and the bias.

    Arguments that have their default value may be left out by torch.
    """
    given = arguments[count:]
    site = given[0] if given else 0
    return arguments[:count], site, given[1] if len(given) > 1 else None


@functools.lru_cache(maxsize=4096)
def patterns_of(
    cls: type[Pattern], num_heads: int, parameters: tuple[tuple[Any, ...], ...]
) -> HeadPatterns:
    """The pattern of each head from its op's arguments: per field, one value per head."""
    patterns = [cls(*values) for values in zip(*parameters, strict=True)] or [cls()] * num_heads
    return HeadPatterns(tuple(patterns), cls.width(patterns))


def index_op(cls: type[Pattern]) -> torch._ops.OpOverload:
    """The registered op of a pattern."""
    return named_op(cls.name)


def named_op(name: str) -> torch._ops.OpOverload:
    """The registered op of the pattern of a name."""
    op: torch._ops.OpOverload = getattr(torch.ops.minference, name).default
    return op


def head_slots(patterns: Sequence[Pattern], heads: Sequence[int], group: int) -> tuple[int, ...]:
    """`head_slots` of the index that a class of patterns estimates for some heads.

    patterns: of one class, one per head; heads: the query heads; group: query heads per kv head.
    """
    if patterns[0].form == "lists":
        return index_rows(patterns, heads, group)
    return diagonal_slots(len(heads))


@functools.lru_cache(maxsize=4096)
def slots_of(own: HeadPatterns, heads: tuple[int, ...], group: int) -> tuple[int, ...]:
    """`head_slots` of the heads of an op, which asks in each call."""
    return head_slots(own.patterns, heads, group)


def shared_slots(patterns: Sequence[Pattern], slots: Sequence[int]) -> tuple[int, ...]:
    """`head_slots` in which heads of one input-independent pattern read the row of the first one.

    patterns, slots: one per head. The rows are equal anyway; named by one number, a kernel can take
    several query heads of a kv head together.
    """
    first: dict[Pattern, int] = {}
    return tuple(
        first.setdefault(pattern, slot) if pattern.input_independent else slot
        for pattern, slot in zip(patterns, slots, strict=True)
    )
