"""Attention over tensors that are not [B, H, N, D]: heads in the batch, more batches, no heads.

A tensor [B*H, N, D] is [B, H, N, D] in row-major order, and so is [.., H, N, D] with the dimensions
before H as one batch. Operands of these shapes get new nodes of four dimensions, which are dead
until a rewrite reads them; scores, masks and outputs keep the dimensions that they have.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.nodes import MADE_HERE, example, is_tensor, same_size, shape_of
from mpass.graph.sizes import agree
from mpass.masks.elements import is_one
from mpass.masks.expressions import axis
from mpass.masks.prover import RULES, MaskProver
from mpass.masks.reader import GraphReader
from mpass.match.repeat_kv import ancestors

aten = torch.ops.aten


def made(before: fx.Node, function: Any, node: fx.Node, *arguments: Any) -> fx.Node:
    """A new node before another, with its example value; dead until a rewrite reads it.

    It reads what `before` would read, so that writes in between cannot come into it.
    """
    with node.graph.inserting_before(before):
        result = node.graph.call_function(function, (node, *arguments))
    with torch.no_grad():
        result.meta["example_value"] = function(example(node), *arguments)
    result.meta[MADE_HERE] = True
    return result


def unfolded(node: fx.Node, heads: int, before: fx.Node) -> fx.Node:
    """A new node [B, H, N, D] with the elements of a tensor [B*H, N, D]: a view."""
    if heads == 1:
        return made(before, aten.unsqueeze.default, node, 1)
    return made(before, aten.unflatten.int, node, 0, [-1, heads])


def merged(node: fx.Node, before: fx.Node) -> fx.Node:
    """A new node [B, H, N, D] with the elements of a tensor [.., H, N, D]."""
    return made(before, aten.flatten.using_ints, node, 0, len(shape_of(node)) - 4)


def without_heads(node: fx.Node, order: tuple[int, ...], before: fx.Node) -> fx.Node:
    """A new node [B, 1, N, D] of a tensor whose dimensions `order` has as batch, position, channel.

    All heads read it.
    """
    return unfolded(in_order(node, order, before), 1, before)


def in_order(node: fx.Node, order: tuple[int, ...], before: fx.Node) -> fx.Node:
    """A tensor with its dimensions in order: itself, or a new node."""
    if order == tuple(range(len(order))):
        return node
    return made(before, aten.permute.default, node, list(order))


def folds_to_four(query: fx.Node, key: fx.Node, value: fx.Node) -> bool:
    """Whether three tensors are all [R, N, D], or all [.., H, N, D] of the same batches.

    Batches that are broadcast are none of these.
    """
    shapes = [shape_of(node) for node in (query, key, value)]
    rank = len(shapes[0])
    if rank == 4 or rank < 3 or any(len(shape) != rank for shape in shapes):
        return False
    batches = [shape[: max(1, rank - 3)] for shape in shapes]
    return all(
        agree(size, other)
        for others in batches[1:]
        for size, other in zip(batches[0], others, strict=True)
    )


def heads_behind(query: fx.Node, reader: fx.Node, prover: MaskProver) -> int:
    """H of the [B, H, N, D] tensor that a query [B*H, N, D] was made of, as `reader` sees it.

    1 where there is none: then the rows of [R, N, D] are a batch, which is as right.
    """
    rows, length, channels = shape_of(query)
    for candidate in ancestors(query):
        shape = shape_of(candidate)
        if len(shape) != 4 or not isinstance(shape[1], int) or shape[1] < 2:
            continue
        if not (same_size(shape[2], length) and same_size(shape[3], channels)):
            continue
        if same_size(shape[0] * shape[1], rows) and is_fold_of(query, candidate, reader, prover):
            return shape[1]
    return 1


def is_fold_of(node: fx.Node, candidate: fx.Node, reader: fx.Node, prover: MaskProver) -> bool:
    """Whether element [b * H + h, n, d] of a tensor is element [b, h, n, d] of another."""
    shape = shape_of(candidate)
    places = [sympy.Integer(0) if is_one(size) else axis(i) for i, size in enumerate(shape)]
    atom = sympy.Function("element")(*places)
    expr = GraphReader(prover.writes, RULES, {candidate: atom}).read(node, reader)
    if not isinstance(expr, AppliedUndef) or expr.func != atom.func:
        return False
    heads = shape[1]
    expected = [sympy.floor(axis(0) / heads), sympy.Mod(axis(0), heads), axis(1), axis(2)]
    if is_one(shape[0]):
        expected[1] = axis(0)
    wanted = [
        sympy.Integer(0) if is_one(size) else place
        for size, place in zip(shape, expected, strict=True)
    ]
    # With a batch of one the index of a row is the head, whether or not a remainder is taken.
    got = list(expr.args)
    if is_one(shape[0]):
        got[1] = got[1].xreplace({sympy.Mod(axis(0), heads): axis(0)})
    return got == wanted


def four_dimensional(
    query: fx.Node, key: fx.Node, value: fx.Node, reader: fx.Node, prover: MaskProver
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """New nodes of four dimensions for operands that `folds_to_four`."""
    if len(shape_of(query)) > 4:
        return merged(query, reader), merged(key, reader), merged(value, reader)
    heads = heads_behind(query, reader, prover)
    return (
        unfolded(query, heads, reader),
        unfolded(key, heads, reader),
        unfolded(value, heads, reader),
    )


def leading_sizes(node: fx.Node) -> tuple[Any, ...] | None:
    """The sizes before [Nq, Nk] or [N, D] of a tensor that is not of four dimensions."""
    shape = shape_of(node)
    return None if len(shape) == 4 else tuple(shape[:-2])


def readable(mask: object, folded: bool) -> bool:
    """Whether a mask of folded scores may be read as one of [B, H, Nq, Nk]: it is the same for all.

    Its dimensions are not those of batch and head otherwise.
    """
    if not folded or not isinstance(mask, fx.Node) or not is_tensor(mask):
        return True
    return all(is_one(size) for size in example(mask).shape[:-2])
