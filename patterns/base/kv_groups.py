"""One selection for the query heads of a kv head: `per="kv_head"` of patterns that list blocks.

Query heads of one kv head that have the same pattern make one row of the index. Query rows are
taken in turn from them: an estimator is given one query head per row of the index, made of their
rows, and so costs as much as for one head. What it sums over query rows is then a mean over heads,
what it takes the greatest of is the greatest of any, and every lowering serves it as it is.

Letters: B batch, H query heads, Hk kv heads, h heads asked for, R rows of the index, G query heads
of a row, Nq queries, D head_dim.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.patterns.base.parameters import parameter_kinds
from mpass.patterns.base.pattern import Pattern

Per = Literal["head", "kv_head"]
"""For what a selection is made: each query head, or the query heads of a kv head together."""


def has_option(cls: type[Pattern]) -> bool:
    """Whether a class has a field `per` of these two values, and not another one of that name."""
    kind = parameter_kinds(cls).get("per")
    return kind is not None and kind.choices == get_args(Per)


@dataclass(frozen=True, slots=True)
class Turns:
    """Which of the G query heads of a row of the index gives the query row at a position p.

    It is head `(p // length + skew * (p % length)) % G`. length: so many consecutive positions are
    looked at together, or only one of so many is looked at; skew: so that the heads also take turns
    in a run of consecutive positions, 0 where one head is to give all of them.
    """

    length: int = 1
    skew: int = 0


def index_rows(patterns: Sequence[Pattern], heads: Sequence[int], group: int) -> tuple[int, ...]:
    """The row of the index that each of `heads` reads, counted in the order of their first heads.

    patterns: one per head; group: query heads per kv head.
    """
    rows: dict[Any, int] = {}
    keys = [
        (head // group, pattern) if pattern.per_kv_head() else (head, None)
        for pattern, head in zip(patterns, heads, strict=True)
    ]
    return tuple(rows.setdefault(key, len(rows)) for key in keys)


def merge_heads(
    inputs: EstimateInputs, rows: Sequence[int], turns: Sequence[Turns]
) -> EstimateInputs:
    """The inputs of an estimator with one query head per row of the index.

    rows: of `index_rows`, one per head of the inputs; turns: one per row of the index. The query is
    [B, Hk * m, Nq, D], where m is the most rows that a kv head has; what none of `heads` names is
    not written. A bias by distance is the mean of those of the heads.
    """
    members: list[list[int]] = [[] for _ in turns]
    for head, row in zip(inputs.heads, rows, strict=True):
        members[row].append(head)
    kv_heads = [own[0] // inputs.group for own in members]
    places = [kv_heads[:row].count(kv_head) for row, kv_head in enumerate(kv_heads)]
    most = max(places) + 1
    heads = [kv_head * most + place for kv_head, place in zip(kv_heads, places, strict=True)]
    batch, _, num_queries, dim = inputs.query.shape
    query = inputs.query.new_empty(batch, inputs.key.shape[1] * most, num_queries, dim)
    offset = inputs.mask.query_offset
    num_heads = inputs.query.shape[1]
    whole = [list(range(h, h + inputs.group)) for h in range(0, num_heads, inputs.group)]
    if heads == list(range(query.shape[1])) and members == whole and len(set(turns)) == 1:
        take_turns(query, inputs.query.unflatten(1, (len(members), -1)), turns[0], offset)
    else:
        for head, own, turn in zip(heads, members, turns, strict=True):
            given = torch.stack([inputs.query[:, member] for member in own], 1)[:, None]
            take_turns(query[:, head : head + 1], given, turn, offset)
    bias = inputs.distance_bias
    if bias is not None and bias.shape[0] > 1:
        joined = bias.new_zeros(query.shape[1], bias.shape[1], dtype=torch.float32)
        for head, own in zip(heads, members, strict=True):
            joined[head] = torch.stack([bias[member] for member in own]).float().mean(0)
        bias = joined
    return replace(inputs, query=query, heads=heads, distance_bias=bias)


def take_turns(out: Tensor, given: Tensor, turns: Turns, offset: int) -> None:
    """Fill `out` [B, R, Nq, D] with the rows of `given` [B, R, G, Nq, D] in turn.

    offset: position of the first row.
    """
    if is_made_of_words(given) and is_made_of_words(out):
        given, out = given.view(torch.int64), out.view(torch.int64)
    length = turns.length
    if turns.skew == 0 or length == 1:
        copy_runs(out, given, length, offset)
        return
    for place in range(length):
        first = (place - offset) % length
        start = (offset + first) // length + turns.skew * place
        copy_runs(out[:, :, first::length], given[:, :, :, first::length], 1, start)


def is_made_of_words(tensor: Tensor) -> bool:
    """Whether rows may be copied 8 bytes at a time: fewer elements, each of which is addressed."""
    per_word = 8 // tensor.element_size()
    sizes = (tensor.shape[-1], tensor.storage_offset(), *tensor.stride()[:-1])
    return tensor.stride(-1) == 1 and per_word > 1 and all(n % per_word == 0 for n in sizes)


def copy_runs(out: Tensor, given: Tensor, length: int, start: int) -> None:
    """As `take_turns`, where row r comes from head `(start + r) // length % G`.

    Whole rounds of all heads are one copy, which reads no row in vain.
    """
    count, num_rows = given.shape[2:4]
    first = min(-start % (length * count), num_rows)
    rounds = (num_rows - first) // (length * count)
    last = first + rounds * length * count
    if rounds:
        dims = (rounds, count, length)
        whole = given[:, :, :, first:last].unflatten(3, dims).diagonal(dim1=2, dim2=4)
        out[:, :, first:last].unflatten(2, dims).copy_(whole.movedim(-1, 3))
    row = 0
    while row < num_rows:
        if first <= row < last:
            row = last
            continue
        stop = min(row + length - (start + row) % length, num_rows)
        out[:, :, row:stop] = given[:, :, (start + row) // length % count, row:stop]
        row = stop


def spread_columns(index: SparseIndex, rows: Sequence[int]) -> SparseIndex:
    """An index of one head per row as one of the heads that read the rows.

    rows: of `index_rows`.
    """
    counts, entries = index.column_count.unbind(1), index.column_index.unbind(1)
    return replace(
        index,
        # Stacked, not indexed by a list: that would copy from the host, which no graph captures.
        column_count=torch.stack([counts[row] for row in rows], 1),
        column_index=torch.stack([entries[row] for row in rows], 1),
        head_slots=tuple(index.head_slots[row] for row in rows),
    )
