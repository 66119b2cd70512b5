"""Rules for ops that move elements: views, repetition, padding, joining.

The element of the result is an element of the operand at other indices.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.nodes import op_name
from mpass.masks.elements import align, dimension, is_one, unwrap_constant
from mpass.masks.expressions import (
    Expr,
    NotUnderstood,
    Where,
    as_number,
    as_truth,
    axis,
    compare,
    is_truth,
    number,
    select,
    substitute,
)
from mpass.masks.reader import OpCall, Rule, registrar
from mpass.masks.rules.values import cast

SHAPE_RULES: dict[str, Rule] = {}

rule = registrar(SHAPE_RULES)


# -- views ------------------------------------------------------------------------------------


@rule("expand", "expand_as", "broadcast_to")
def expand(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    call.skip_sizes()
    return align(expr, len(shape), len(call.shape))


@rule("unsqueeze")
def unsqueeze(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    dim = dimension(call.argument(1, "dim"), len(shape) + 1)
    return substitute(expr, {axis(i): axis(i + 1) for i in range(dim, len(shape))})


@rule("permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims")
def permute(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    order = permutation(call, len(shape))
    return substitute(expr, {axis(old): axis(new) for new, old in enumerate(order)})


def permutation(call: OpCall, rank: int) -> list[int]:
    """The operand's dimension that each dimension of the result is."""
    name = op_name(call.node)
    order = list(range(rank))
    if name == "permute":
        return [dimension(dim, rank) for dim in call.rest(1, "dims")]
    if name in ("t", "T", "mT"):
        if rank < 2 or (rank > 2 and name != "mT"):
            raise NotUnderstood(f"{name} of {rank} dimensions")
        first, second = rank - 2, rank - 1
    else:
        names = ("axis0", "axis1") if name == "swapaxes" else ("dim0", "dim1")
        first, second = call.argument(1, names[0]), call.argument(2, names[1])
    first, second = dimension(first, rank), dimension(second, rank)
    order[first], order[second] = order[second], order[first]
    return order


@rule("view", "reshape", "squeeze", "flatten", "unflatten", "view_as", "reshape_as")
@rule("unsafe_view", "view_copy", "reshape_copy")
def reshape(call: OpCall) -> Expr:
    """Any change of shape in row-major order."""
    expr, shape = call.tensor()
    call.skip_sizes()
    return expr.xreplace(reshape_map(shape, call.shape))


def reshape_map(old: Sequence[Any], new: Sequence[Any]) -> dict[Expr, Expr]:
    """The operand's indices in terms of the result's, for a row-major reshape.

    Dimensions are grouped from the left such that each group has as many elements on both sides.
    """
    replacement: dict[Expr, Expr] = {}
    left = [(i, number(size)) for i, size in enumerate(old) if not is_one(size)]
    right = [(i, number(size)) for i, size in enumerate(new) if not is_one(size)]
    while left or right:
        group, sizes = take_group(left, right)
        linear = sympy.Integer(0)
        for i, size in sizes:
            linear = linear * size + axis(i)
        for i, size in reversed(group[1:]):
            replacement[axis(i)] = sympy.Mod(linear, size)
            linear = sympy.floor(linear / size)
        replacement[axis(group[0][0])] = linear
    return replacement


Sizes = list[tuple[int, Expr]]


def take_group(left: Sizes, right: Sizes) -> tuple[Sizes, Sizes]:
    """Move the shortest leading groups with equal numbers of elements off both lists."""
    if not (left and right):
        raise NotUnderstood("reshape of unknown sizes")
    a, b = [left.pop(0)], [right.pop(0)]
    product_a, product_b = a[0][1], b[0][1]
    while product_a != product_b:
        if is_smaller(product_a, product_b):
            a.append(next_size(left))
            product_a = sympy.expand(product_a * a[-1][1])
        else:
            b.append(next_size(right))
            product_b = sympy.expand(product_b * b[-1][1])
    return a, b


def next_size(sizes: Sizes) -> tuple[int, Expr]:
    if not sizes:
        raise NotUnderstood("reshape of unknown sizes")
    return sizes.pop(0)


def is_smaller(left: Expr, right: Expr) -> bool:
    """Which of two products of sizes has to grow for them to become equal."""
    negative = (left - right).is_negative
    if negative is not None:
        return bool(negative)
    if sympy.cancel(right / left).is_integer:
        return True
    if sympy.cancel(left / right).is_integer:
        return False
    raise NotUnderstood("reshape of unknown sizes")


@rule("repeat", "tile")
def repeat(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    call.skip_sizes()
    shift = len(call.shape) - len(shape)
    replacement = {
        axis(i): sympy.Mod(axis(i + shift), number(size))
        if number(size) != number(call.shape[i + shift])
        else axis(i + shift)
        for i, size in enumerate(shape)
        if not is_one(size)
    }
    return expr.xreplace(replacement)


@rule("repeat_interleave")
def repeat_interleave(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    repeats, dim = call.argument(1, "repeats"), call.argument(2, "dim")
    call.skip_sizes(3)
    if not isinstance(repeats, int) or dim is None:
        raise NotUnderstood("repeat_interleave by a tensor, or flattening")
    along = axis(dimension(dim, len(shape)))
    return expr.xreplace({along: sympy.floor(along / repeats)})


def is_empty(shape: torch.Size) -> bool:
    """Whether a shape is the [0] that torch.cat ignores."""
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0


# -- padding and joining ----------------------------------------------------------------------


@rule("pad", "constant_pad_nd")
def pad(call: OpCall) -> Expr:
    """Constant padding at either end of trailing dimensions; negative padding cuts."""
    expr, shape = call.tensor()
    amounts = call.argument(1, "pad")
    if op_name(call.node) == "constant_pad_nd":
        mode, value = "constant", call.argument(2, "value", 0)
    else:
        mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    if mode != "constant" or not isinstance(amounts, (list, tuple)):
        raise NotUnderstood(f"padding with mode {mode!r}")
    inside: list[Expr] = []
    moved: dict[Expr, Expr] = {}
    for pair in range(len(amounts) // 2):
        dim = len(shape) - 1 - pair
        before, after = (
            number(unwrap_constant(amount)) for amount in amounts[2 * pair : 2 * pair + 2]
        )
        if before != 0:
            moved[axis(dim)] = axis(dim) - before
            inside.append(compare(sympy.Ge, axis(dim), before))
        if after != 0:
            inside.append(compare(sympy.Lt, axis(dim), before + number(shape[dim])))
    outside = number(0 if value is None else value)
    expr = substitute(expr, moved)
    if is_truth(expr):
        return select(sympy.And(*inside), expr, as_truth(as_number(outside)))
    return Where(sympy.And(*inside), expr, cast(as_number(outside), call.dtype))


@rule("cat", "concat", "concatenate")
def cat(call: OpCall) -> Expr:
    """Two or more tensors, one after the other along a dimension."""
    tensors = call.argument(0, "tensors")
    if not isinstance(tensors, (list, tuple)):
        raise NotUnderstood("cat of no list")
    # torch.cat skips empty tensors of one dimension, as an empty cache layer holds.
    if not all(isinstance(node, fx.Node) for node in tensors):
        raise NotUnderstood("cat of what is no tensor")
    shapes = {node: call.shape_of(node) for node in tensors}
    nodes = [node for node in tensors if not is_empty(shapes[node])]
    dim = dimension(call.argument(1, "dim", 0), len(call.shape))
    along = axis(dim)
    starts = [number(0)]
    for node in nodes:
        starts.append(starts[-1] + number(shapes[node][dim]))
    result: Expr | None = None
    for node, start, end in reversed(list(zip(nodes, starts, starts[1:], strict=False))):
        expr = call.read(node)
        if is_one(shapes[node][dim]):
            part = expr
        else:
            part = substitute(expr, {along: along - start})
        if result is None:
            result = part
        else:
            result = select(compare(sympy.Lt, along, end), part, result)
    if result is None:
        raise NotUnderstood("cat of nothing")
    return cast(result, call.dtype)
