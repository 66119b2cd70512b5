"""Looking through copies of keys and values: repeated kv heads, transposes, contiguous.

Whatever the spelling (expand and reshape, repeat_interleave, indexing), the element that attention
reads is written in terms of an earlier tensor; if that is element [b, h // groups, n, d] of a
[B, Hk, N, D] tensor, attention can read this one instead and the copy disappears.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.arguments import subject
from mpass.graph.call_keys import Unobservable, exact_key, exact_tensor
from mpass.graph.nodes import MADE_HERE, example, is_tensor, op_name, same_size, shape_of
from mpass.graph.writes import StorageWrites
from mpass.masks.elements import drop_unit_axes
from mpass.masks.expressions import Expr, axis
from mpass.masks.prover import RULES, MaskProver
from mpass.masks.reader import GraphReader

STRUCTURAL = frozenset(
    "getitem index unsqueeze squeeze expand expand_as broadcast_to reshape view unsafe_view "
    "flatten unflatten transpose permute swapaxes contiguous clone repeat_interleave "
    "index_select mT".split()
)

IDENTITY = (0, 1, 2, 3)
MAX_STEPS = 8


def original(
    node: fx.Node,
    reader: fx.Node,
    output: fx.Node,
    prover: MaskProver,
    order: tuple[int, ...] = IDENTITY,
) -> fx.Node:
    """The [B, Hk, N, D] tensor behind a 4-D operand of attention, to be read at `output`.

    reader: the product that reads the operand: what is written later is none of its business.
    order: the operand's dimensions that are batch, head, position and channel. If nothing earlier
    can stand for it, the operand itself is returned, permuted by a new node if it has to be; then
    the caller has to see to it that nothing writes to it before the output (`made_from`).
    """
    best: fx.Node | None = None
    heads: object = shape_of(node)[order[1]]
    for candidate in ancestors(node):
        if not fits(candidate, node, order, heads):
            continue
        if prover.writes.written_between(candidate, next_on_path(candidate, node), output):
            continue
        if reads_by_head(node, candidate, reader, prover, order):
            best, heads = candidate, shape_of(candidate)[1]
    if best is not None:
        return best
    return node if order == IDENTITY else permuted(node, order)


def original_pair(
    key: fx.Node,
    value: fx.Node,
    reader: fx.Node,
    output: fx.Node,
    prover: MaskProver,
    key_order: tuple[int, ...] = IDENTITY,
    value_order: tuple[int, ...] = IDENTITY,
) -> tuple[fx.Node, fx.Node]:
    """Key and value behind their copies, both with the same number of kv heads.

    reader: what reads the key; the value is read at the output.
    """
    pair = (
        original(key, reader, output, prover, key_order),
        original(value, output, output, prover, value_order),
    )
    if same_size(shape_of(pair[0])[1], shape_of(pair[1])[1]):
        return pair
    return (
        key if key_order == IDENTITY else permuted(key, key_order),
        value if value_order == IDENTITY else permuted(value, value_order),
    )


def ancestors(node: fx.Node) -> Iterator[fx.Node]:
    """Tensors that a tensor is a rearrangement of, nearest first."""
    for _ in range(MAX_STEPS):
        first = subject(node)
        if op_name(node) not in STRUCTURAL or not isinstance(first, fx.Node):
            return
        if not is_tensor(first):
            return
        node = first
        yield node


def next_on_path(candidate: fx.Node, node: fx.Node) -> fx.Node:
    """The op on the way to `node` that reads `candidate`."""
    while subject(node) is not candidate:
        node = subject(node)
    return node


def fits(candidate: fx.Node, node: fx.Node, order: tuple[int, ...], heads: object) -> bool:
    """Whether an earlier tensor has the sizes of the operand, with no more heads."""
    shape, wanted = shape_of(candidate), shape_of(node)
    if len(shape) != 4 or not isinstance(shape[1], int) or not isinstance(heads, int):
        return False
    if not 0 < shape[1] <= heads or heads % shape[1]:
        return False
    return all(same_size(shape[i], wanted[order[i]]) for i in (0, 2, 3))


def reads_by_head(
    node: fx.Node,
    candidate: fx.Node,
    reader: fx.Node,
    prover: MaskProver,
    order: tuple[int, ...],
) -> bool:
    """Whether element [b, h, n, d] of an operand is element [b, h // groups, n, d] of another.

    Layers mostly rearrange their keys and values in the same way: the prover keeps what was found.
    """
    key = rearrangement(node, candidate, reader, prover.writes)
    if key is None:
        return is_by_head(node, candidate, reader, prover, order)
    if (key, order) not in prover.rearrangements:
        found = is_by_head(node, candidate, reader, prover, order)
        prover.rearrangements[key, order] = found
    return prover.rearrangements[key, order]


def rearrangement(node: fx.Node, candidate: fx.Node, reader: fx.Node, writes: StorageWrites) -> Any:
    """A key that equal ways from one tensor to another have; None where more than it decides.

    Equal: the same ops with the same numbers on tensors of the same sizes, nothing written between.
    """
    steps: list[Any] = []
    step = node
    try:
        while step is not candidate:
            position = writes.position[reader]
            if writes.last_write(step, position) is not None or writes.reshaped(step) is not None:
                return None
            before = subject(step)
            named = {before: "subject"}
            given = exact_key((step.args, dict(step.kwargs)), named)
            steps.append((step.op, step.target, given, exact_tensor(example(step))))
            step = before
        if writes.reshaped(candidate) is not None:
            return None
        return (*steps, exact_tensor(example(candidate)))
    except Unobservable:
        return None


def is_by_head(
    node: fx.Node,
    candidate: fx.Node,
    reader: fx.Node,
    prover: MaskProver,
    order: tuple[int, ...],
) -> bool:
    """What `reads_by_head` says, read from the ops between."""
    atom = sympy.Function("element")(*map(axis, IDENTITY))
    expr = GraphReader(prover.writes, RULES, {candidate: atom}).read(node, reader)
    if not isinstance(expr, AppliedUndef) or expr.func != atom.func:
        return False
    kv_heads = shape_of(candidate)[1]
    groups = shape_of(node)[order[1]] // kv_heads
    expected: list[Expr] = [axis(dim) for dim in order]
    expected[1] = sympy.Integer(0) if kv_heads == 1 else sympy.floor(expected[1] / groups)
    shape = shape_of(node)
    return all(
        got == drop_unit_axes(want, shape) for got, want in zip(expr.args, expected, strict=True)
    )


def permuted(node: fx.Node, order: tuple[int, ...]) -> fx.Node:
    """A new node with an operand's dimensions in order; dead until a rewrite reads it."""
    with node.graph.inserting_after(node):
        result = node.graph.call_function(torch.ops.aten.permute.default, (node, list(order)))
    result.meta["example_value"] = example(node).permute(order)
    result.meta[MADE_HERE] = True
    return result


def made_from(node: fx.Node) -> fx.Node:
    """The tensor that a node is, or that it is a view or a permutation of which was made here."""
    while MADE_HERE in node.meta:
        node = node.all_input_nodes[0]
    return node
