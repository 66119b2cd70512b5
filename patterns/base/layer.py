"""The attention of one layer by the ops of rewritten graphs: heads are grouped by their patterns.

Each kind of pattern among the heads is estimated by one op, whose results are joined; one attention
follows. The rewrite puts these ops into graphs; `attend_heads` calls them.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import mpass.lowering.lse_ops
import mpass.lowering.steps_op
import mpass.lowering.training_ops  # noqa: F401  (defines minference::sparse_attention_train)
from mpass.lowering.index import AttentionMask, join_slots
from mpass.patterns.base.op import head_slots, named_op, shared_slots
from mpass.patterns.base.pattern import Pattern


@dataclass(frozen=True, slots=True, eq=False)
class HeadGroup:
    """The heads of one kind of pattern.

    name: of the pattern; heads: in ascending order; parameters: per field of the pattern, one value
    per head.
    """

    name: str
    heads: list[int]
    parameters: list[list[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class HeadGroups:
    """All heads of a layer, and how their indexes become one.

    slots: `head_slots` of the layer's index. flat_slots, flat_heads, sizes: what `join_indexes`
    needs where there are several groups. all_dense: whether no head is sparse. The lists are
    arguments of ops and are never written to.
    """

    groups: tuple[HeadGroup, ...]
    slots: list[int]
    flat_slots: list[int]
    flat_heads: list[int]
    sizes: list[int]
    all_dense: bool


def group_heads(patterns: Sequence[Pattern], kv_group: int) -> HeadGroups:
    """The heads of a layer by the kinds of their patterns.

    patterns: one per head; kv_group: query heads per kv head.
    """
    by_class: dict[type[Pattern], list[int]] = {}
    for head, pattern in enumerate(patterns):
        by_class.setdefault(type(pattern), []).append(head)
    groups = []
    for cls, heads in by_class.items():
        values = [patterns[head].parameters() for head in heads]
        parameters = [[own[name] for own in values] for name in values[0]]
        groups.append(HeadGroup(cls.name, heads, parameters))
    slots = [
        head_slots([patterns[head] for head in heads], heads, kv_group)
        for heads in by_class.values()
    ]
    joined = join_slots(slots, list(by_class.values()))
    return HeadGroups(
        groups=tuple(groups),
        slots=list(shared_slots(patterns, joined)),
        flat_slots=[slot for part in slots for slot in part],
        flat_heads=[head for heads in by_class.values() for head in heads],
        sizes=[len(heads) for heads in by_class.values()],
        all_dense=all(pattern.name == "dense" for pattern in patterns),
    )


@functools.lru_cache(maxsize=1024)
def groups_of(patterns: tuple[Pattern, ...], kv_group: int) -> HeadGroups:
    """`group_heads`, remembered: an engine asks for the same layers in every call."""
    return group_heads(patterns, kv_group)


def attend_heads(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: HeadGroups,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dense_above: float,
    min_seq_len: int = 0,
    layer: int = -1,
    site: int = 0,
    measured: int = 0,
    most_lost: float = 1.0,
    int8: bool = False,
    distance_bias: Tensor | None = None,
) -> Tensor:
    """Estimate the index of a layer and attend over it, now: [B, H, Nq, Dv].

    The arguments are those of `minference::sparse_attention`.
    """
    out: Tensor = torch.ops.minference.sparse_attention.default(
        *attention_arguments(
            *(query, key, value, heads, mask, scale, softcap, sinks),
            *(dense_above, min_seq_len, layer, site),
            distance_bias,
        ),
        measured,
        most_lost,
        int8,
        distance_bias,
    )
    return out


def attend_heads_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: HeadGroups,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    dense_above: float,
    min_seq_len: int = 0,
    layer: int = -1,
    site: int = 0,
) -> tuple[Tensor, Tensor]:
    """`attend_heads`, and the log-sum-exps [B, H, Nq]."""
    out, lse = torch.ops.minference.sparse_attention_lse.default(
        *attention_arguments(
            *(query, key, value, heads, mask, scale, softcap, sinks),
            *(dense_above, min_seq_len, layer, site),
        )
    )
    return out, lse


def attention_arguments(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    heads: HeadGroups,
    mask: AttentionMask,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
    dense_above: float,
    min_seq_len: int,
    layer: int,
    site: int,
    distance_bias: Tensor | None = None,
) -> tuple[Any, ...]:
    """The arguments of `minference::sparse_attention`, the index estimated."""
    visible = (mask.query_offset, mask.window, mask.causal)
    limits = (dense_above, min_seq_len)
    parts: list[Tensor] = []
    for group in heads.groups:
        arguments = (query, key, mask.key_mask, group.heads, *visible, scale)
        parts += named_op(group.name)(*arguments, *limits, *group.parameters, site, distance_bias)
    if len(heads.groups) > 1:
        order = (heads.flat_slots, heads.flat_heads, heads.sizes)
        parts = list(torch.ops.minference.join_indexes.default(parts, *order))
    return (
        *(query, key, value, *parts, heads.slots, mask.key_mask, sinks),
        *(*visible, scale, softcap, *limits, layer, site),
    )
