"""Rules for ops that move elements: indexing, views, padding, repetition.

The element of the result is an element of the operand at other indices.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from mpass.mask_expr import (
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
from mpass.mask_reader import Call, Rule, align, is_one, op_name, plain
from mpass.mask_rules import cast, dimension
from mpass.site import example

SHAPE_RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ops of these names."""

    def register(function: Rule) -> Rule:
        SHAPE_RULES.update(dict.fromkeys(names, function))
        return function

    return register


# -- indexing ---------------------------------------------------------------------------------


@rule("getitem", "index")
def getitem(call: Call) -> Expr:
    """x[...] with None, slices, integers, an ellipsis and integer tensors."""
    expr, shape = call.tensor()
    index = call.argument(1, "indices")
    items = list(index) if isinstance(index, (list, tuple)) else [index]
    if call.node.target is torch.ops.aten.index.Tensor:
        items = [slice(None) if item is None else item for item in items]
    return expr.xreplace(index_map(call, shape, items))


def index_map(call: Call, shape: torch.Size, items: list[Any]) -> dict[Expr, Expr]:
    """Which index of the operand each index of x[items] reads."""
    items = full_index(items, len(shape))
    tensors = [item for item in items if isinstance(item, fx.Node)]
    if any(is_truth(call.read(item)) for item in tensors):
        raise NotUnderstood("indexing by a mask")
    block = max((example(item).dim() for item in tensors), default=0)
    places = [i for i, item in enumerate(items) if is_advanced(item, bool(tensors))]
    adjacent = not places or places[-1] - places[0] + 1 == len(places)

    replacement: dict[Expr, Expr] = {}
    source, target = 0, 0 if adjacent else block
    start = 0
    for place, item in enumerate(items):
        if place in places:
            if adjacent and place == places[0]:
                start, target = target, target + block
            replacement[axis(source)] = gathered(call, item, start, block, shape[source])
            source += 1
        elif item is None:
            target += 1
        elif isinstance(item, slice):
            begin, step = slice_bounds(item, shape[source])
            replacement[axis(source)] = begin + step * axis(target)
            source, target = source + 1, target + 1
        else:
            replacement[axis(source)] = from_start(number(item), shape[source])
            source += 1
    return replacement


def full_index(items: list[Any], rank: int) -> list[Any]:
    """An index with the ellipsis and what is left out at the end written as whole slices."""
    if any(isinstance(item, bool) for item in items):
        raise NotUnderstood("indexing by True or False")
    used = sum(item is not None and item is not Ellipsis for item in items)
    missing = [slice(None)] * (rank - used)
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if not dots:
        return [plain_slice(item) for item in items] + missing
    return [plain_slice(i) for i in items[: dots[0]] + missing + items[dots[0] + 1 :]]


def plain_slice(item: Any) -> Any:
    """A slice or integer with nodes for numbers replaced by these."""
    if isinstance(item, slice):
        return slice(plain(item.start), plain(item.stop), plain(item.step))
    return plain(item)


def is_advanced(item: Any, with_tensors: bool) -> bool:
    """Whether an item takes part in advanced indexing; integers do beside tensors."""
    if isinstance(item, fx.Node):
        return True
    return with_tensors and item is not None and not isinstance(item, slice)


def gathered(call: Call, item: Any, start: int, block: int, size: Any) -> Expr:
    """The index that an index tensor, broadcast to the block of them, holds."""
    if not isinstance(item, fx.Node):
        return from_start(number(item), size)
    expr = call.read(item)
    if not expr.is_nonnegative:
        raise NotUnderstood("indexing by values that might be negative")
    rank = example(item).dim()
    shift = start + block - rank
    return substitute(expr, {axis(i): axis(i + shift) for i in range(rank)})


def slice_bounds(item: slice, size: Any) -> tuple[Expr, Expr]:
    """First index and step of a slice of a dimension."""
    step = number(1 if item.step is None else item.step)
    if not (step.is_integer and step.is_positive):
        raise NotUnderstood("slice with a step that is not positive")
    if item.start is None:
        return number(0), step
    begin = from_start(number(item.start), size)
    return (number(0) if begin.is_negative else begin), step


def from_start(index: Expr, size: Any) -> Expr:
    """An index counted from the start of a dimension."""
    if index.is_nonnegative:
        return index
    if index.is_negative:
        return number(size) + index
    raise NotUnderstood(f"index {index} of unknown sign")


@rule("select", "slice", "narrow")
def piece(call: Call) -> Expr:
    """x.select(dim, i), aten.slice(x, dim, start, end, step), x.narrow(dim, start, length)."""
    expr, shape = call.tensor()
    dim = dimension(call.argument(1, "dim", 0), len(shape))
    start = call.argument(2, "index", call.argument(2, "start"))
    if "select" in str(call.node.target):
        items: list[Any] = [slice(None)] * dim + [start]
    elif "narrow" in str(call.node.target):
        items = [slice(None)] * dim + [slice(start, None)]
    else:
        items = [slice(None)] * dim + [slice(start, None, call.argument(4, "step", 1))]
    if isinstance(start, fx.Node):
        raise NotUnderstood("slice from a tensor")
    return expr.xreplace(index_map(call, shape, items))


@rule("gather", "take_along_dim")
def gather(call: Call) -> Expr:
    expr, shape = call.tensor()
    place, name = (1, "dim") if "gather" in str(call.node.target) else (2, "dim")
    dim = dimension(call.argument(place, name), len(shape))
    index = call.operand(3 - place, "index" if place == 1 else "indices")
    if not index.is_nonnegative:
        raise NotUnderstood("gathering by values that might be negative")
    # take_along_dim broadcasts: an operand's dimension of size 1 has no index in its expression.
    return expr.xreplace({axis(dim): index})


@rule("index_select")
def index_select(call: Call) -> Expr:
    expr, shape = call.tensor()
    dim = dimension(call.argument(1, "dim"), len(shape))
    index, _ = call.tensor(2, "index")
    if not index.is_nonnegative:
        raise NotUnderstood("selecting by values that might be negative")
    return expr.xreplace({axis(dim): index.xreplace({axis(0): axis(dim)})})


@rule("setitem")
def setitem(call: Call) -> Expr:
    """x[slices] = value: the value inside the slices, x elsewhere."""
    expr, shape = call.tensor()
    index = call.argument(1)
    items = full_index(list(index) if isinstance(index, (list, tuple)) else [index], len(shape))
    value = call.argument(2)
    inside: list[Expr] = []
    local: dict[Expr, Expr] = {}
    kept = [i for i, item in enumerate(items) if isinstance(item, slice)]
    for i, (item, size) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            begin, end = setitem_bounds(item, number(size))
            inside += [
                compare(relation, axis(i), bound)
                for relation, bound in ((sympy.Ge, begin), (sympy.Lt, end))
                if bound not in (number(0), number(size))
            ]
            local[axis(kept.index(i))] = axis(i) - begin
        elif isinstance(item, (int, torch.SymInt)):
            inside.append(compare(sympy.Eq, axis(i), from_start(number(item), size)))
        else:
            raise NotUnderstood("assignment by tensor, mask or new dimension")
    if isinstance(value, fx.Node):
        written = align(call.read(value), example(value).dim(), len(kept))
        written = substitute(written, local)
    else:
        written = number(value)
    dtype = example(call.node.args[0]).dtype  # type: ignore[arg-type]
    written = cast(written, dtype)
    return select(sympy.And(*inside), written, expr)


def setitem_bounds(item: slice, size: Expr) -> tuple[Expr, Expr]:
    """First index of a slice and the one after its last."""
    begin, step = slice_bounds(item, size)
    if step != 1:
        raise NotUnderstood("assignment with a step")
    return begin, size if item.stop is None else from_start(number(item.stop), size)


# -- views ------------------------------------------------------------------------------------


@rule("expand", "expand_as", "broadcast_to")
def expand(call: Call) -> Expr:
    expr, shape = call.tensor()
    return align(expr, len(shape), len(call.shape))


@rule("unsqueeze")
def unsqueeze(call: Call) -> Expr:
    expr, shape = call.tensor()
    dim = dimension(call.argument(1, "dim"), len(shape) + 1)
    return substitute(expr, {axis(i): axis(i + 1) for i in range(dim, len(shape))})


@rule("permute", "transpose", "t", "T", "mT", "swapaxes", "swapdims")
def permute(call: Call) -> Expr:
    expr, shape = call.tensor()
    order = permutation(call, len(shape))
    return substitute(expr, {axis(old): axis(new) for new, old in enumerate(order)})


def permutation(call: Call, rank: int) -> list[int]:
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
        names = ("dim0", "dim1") if name == "transpose" else ("axis0", "axis1")
        first, second = call.argument(1, names[0]), call.argument(2, names[1])
    first, second = dimension(first, rank), dimension(second, rank)
    order[first], order[second] = order[second], order[first]
    return order


@rule("view", "reshape", "squeeze", "flatten", "unflatten", "view_as", "reshape_as")
@rule("unsafe_view", "view_copy", "reshape_copy")
def reshape(call: Call) -> Expr:
    """Any change of shape in row-major order."""
    expr, shape = call.tensor()
    if isinstance(call.argument(1), torch.dtype):
        raise NotUnderstood("reinterpreting bits")
    return expr.xreplace(reshape_map(shape, call.shape))


def reshape_map(old: torch.Size, new: torch.Size) -> dict[Expr, Expr]:
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
def repeat(call: Call) -> Expr:
    expr, shape = call.tensor()
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
def repeat_interleave(call: Call) -> Expr:
    expr, shape = call.tensor()
    repeats, dim = call.argument(1, "repeats"), call.argument(2, "dim")
    if not isinstance(repeats, int) or dim is None:
        raise NotUnderstood("repeat_interleave by a tensor, or flattening")
    along = axis(dimension(dim, len(shape)))
    return expr.xreplace({along: sympy.floor(along / repeats)})


def is_empty(node: fx.Node) -> bool:
    """Whether a tensor is the [0] that torch.cat ignores."""
    shape = example(node).shape
    return len(shape) == 1 and isinstance(shape[0], int) and shape[0] == 0


# -- padding and joining ----------------------------------------------------------------------


@rule("pad", "constant_pad_nd")
def pad(call: Call) -> Expr:
    """Constant padding at either end of trailing dimensions; negative padding cuts."""
    expr, shape = call.tensor()
    amounts = call.argument(1, "pad")
    mode, value = "constant", call.argument(2, "value", 0)
    if "constant" not in str(call.node.target):
        mode, value = call.argument(2, "mode", "constant"), call.argument(3, "value")
    if mode != "constant" or not isinstance(amounts, (list, tuple)):
        raise NotUnderstood(f"padding with mode {mode!r}")
    inside: list[Expr] = []
    moved: dict[Expr, Expr] = {}
    for pair in range(len(amounts) // 2):
        dim = len(shape) - 1 - pair
        before, after = (number(plain(amount)) for amount in amounts[2 * pair : 2 * pair + 2])
        if before != 0:
            moved[axis(dim)] = axis(dim) - before
            inside.append(compare(sympy.Ge, axis(dim), before))
        if after != 0:
            inside.append(compare(sympy.Lt, axis(dim), before + number(shape[dim])))
    outside = number(0 if value is None else value)
    expr = substitute(expr, moved)
    if is_truth(expr):
        return select(sympy.And(*inside), expr, as_truth(as_number(outside)))
    return Where(sympy.And(*inside), expr, as_number(outside))


@rule("cat", "concat", "concatenate")
def cat(call: Call) -> Expr:
    """Two or more tensors, one after the other along a dimension."""
    tensors = call.argument(0, "tensors")
    if not isinstance(tensors, (list, tuple)):
        raise NotUnderstood("cat of no list")
    # torch.cat skips empty tensors of one dimension, as an empty cache layer holds.
    nodes = [node for node in tensors if isinstance(node, fx.Node) and not is_empty(node)]
    dim = dimension(call.argument(1, "dim", 0), len(call.shape))
    along = axis(dim)
    starts = [number(0)]
    for node in nodes:
        starts.append(starts[-1] + number(example(node).shape[dim]))
    result: Expr | None = None
    for node, start, end in reversed(list(zip(nodes, starts, starts[1:], strict=False))):
        expr = call.read(node)
        if is_one(example(node).shape[dim]):
            piece_expr = expr
        else:
            piece_expr = substitute(expr, {along: along - start})
        if result is None:
            result = piece_expr
        else:
            result = select(compare(sympy.Lt, along, end), piece_expr, result)
    if result is None:
        raise NotUnderstood("cat of nothing")
    return result
