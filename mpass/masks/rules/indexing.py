"""Rules for indexing and for assignment to a part.

The element of the result is an element of the operand at other indices.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mpass.graph.nodes import op_name
from mpass.masks.elements import align, dimension, unwrap_constant
from mpass.masks.expressions import (
    Expr,
    NotUnderstood,
    axis,
    compare,
    is_truth,
    number,
    select,
    substitute,
)
from mpass.masks.reader import OpCall, Rule, registrar
from mpass.masks.rules.values import cast

INDEX_RULES: dict[str, Rule] = {}

rule = registrar(INDEX_RULES)


# -- indexing ---------------------------------------------------------------------------------


@rule("getitem", "index")
def getitem(call: OpCall) -> Expr:
    """x[...] with None, slices, integers, an ellipsis and integer tensors."""
    expr, shape = call.tensor()
    index = call.raw(1, "indices")
    if call.node.target is torch.ops.aten.index.Tensor:
        items = [slice(None) if item is None else item for item in index]
    else:
        items = index_items(index)
    return expr.xreplace(index_map(call, shape, items))


def index_items(index: Any) -> list[Any]:
    """The items of an index, one per dimension: x[1, 0] has two, x[[1, 0]] takes two rows."""
    if isinstance(index, list):
        raise NotUnderstood("indexing by a list")
    return list(index) if isinstance(index, tuple) else [index]


def index_map(call: OpCall, shape: torch.Size, items: list[Any]) -> dict[Expr, Expr]:
    """Which index of the operand each index of x[items] reads."""
    items = full_index(items, len(shape))
    tensors = [item for item in items if isinstance(item, fx.Node)]
    if any(is_truth(call.read(item)) for item in tensors):
        raise NotUnderstood("indexing by a mask")
    block = max((len(call.shape_of(item)) for item in tensors), default=0)
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
            replacement[axis(source)] = normalize_index(number(item), shape[source])
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
        return [unwrap_slice(item) for item in items] + missing
    return [unwrap_slice(i) for i in items[: dots[0]] + missing + items[dots[0] + 1 :]]


def unwrap_slice(item: Any) -> Any:
    """A slice or integer with nodes for numbers replaced by these."""
    if isinstance(item, slice):
        return slice(
            unwrap_constant(item.start), unwrap_constant(item.stop), unwrap_constant(item.step)
        )
    return unwrap_constant(item)


def is_advanced(item: Any, with_tensors: bool) -> bool:
    """Whether an item takes part in advanced indexing; integers do beside tensors."""
    if isinstance(item, fx.Node):
        return True
    return with_tensors and item is not None and not isinstance(item, slice)


def gathered(call: OpCall, item: Any, start: int, block: int, size: Any) -> Expr:
    """The index that an index tensor, broadcast to the block of them, holds."""
    if not isinstance(item, fx.Node):
        return normalize_index(number(item), size)
    expr = call.read(item)
    if not expr.is_nonnegative:
        raise NotUnderstood("indexing by values that might be negative")
    rank = len(call.shape_of(item))
    shift = start + block - rank
    return substitute(expr, {axis(i): axis(i + shift) for i in range(rank)})


def slice_bounds(item: slice, size: Any) -> tuple[Expr, Expr]:
    """First index and step of a slice of a dimension."""
    step = number(1 if item.step is None else item.step)
    if not (step.is_integer and step.is_positive):
        raise NotUnderstood("slice with a step that is not positive")
    if item.start is None:
        return number(0), step
    return normalize_bound(number(item.start), size), step


def normalize_bound(bound: Expr, size: Any) -> Expr:
    """A slice's bound counted from the start, where -9 of 5 is 0. What is over the size stays."""
    if bound.is_nonnegative:
        return bound
    if not bound.is_negative:
        raise NotUnderstood(f"slice up to or from {bound}, of unknown sign")
    begin = number(size) + bound
    if begin.is_nonpositive:
        return number(0)
    if isinstance(size, torch.SymInt) and isinstance(bound, sympy.Integer):
        if not statically_known_true(size >= -int(bound)):
            raise NotUnderstood(f"slice of the last {-bound} of {size}, which may be fewer")
    elif not begin.is_nonnegative:
        raise NotUnderstood(f"slice up to or from {begin}, of unknown sign")
    return begin


def normalize_index(index: Expr, size: Any) -> Expr:
    """An index counted from the start of a dimension."""
    if index.is_nonnegative:
        return index
    if index.is_negative:
        return number(size) + index
    raise NotUnderstood(f"index {index} of unknown sign")


@rule("select", "slice", "narrow")
def select_slice(call: OpCall) -> Expr:
    """x.select(dim, i), aten.slice(x, dim, start, end, step), x.narrow(dim, start, length)."""
    expr, shape = call.tensor()
    dim = dimension(call.argument(1, "dim", 0), len(shape))
    name = op_name(call.node)
    start = call.argument(2, "index" if name == "select" else "start")
    if isinstance(start, fx.Node):
        raise NotUnderstood("slice from a tensor")
    item: Any = start
    if name == "narrow":
        call.argument(3, "length")
        item = slice(start, None)
    elif name == "slice":
        call.argument(3, "end")
        item = slice(start, None, call.argument(4, "step", 1))
    return expr.xreplace(index_map(call, shape, [slice(None)] * dim + [item]))


@rule("gather", "take_along_dim")
def gather(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    place, name = (1, "dim") if op_name(call.node) == "gather" else (2, "dim")
    dim = dimension(call.argument(place, name), len(shape))
    index = call.operand(3 - place, "index" if place == 1 else "indices")
    if not index.is_nonnegative:
        raise NotUnderstood("gathering by values that might be negative")
    # take_along_dim broadcasts: an operand's dimension of size 1 has no index in its expression.
    return expr.xreplace({axis(dim): index})


@rule("index_select")
def index_select(call: OpCall) -> Expr:
    expr, shape = call.tensor()
    dim = dimension(call.argument(1, "dim"), len(shape))
    index, _ = call.tensor(2, "index")
    if not index.is_nonnegative:
        raise NotUnderstood("selecting by values that might be negative")
    return expr.xreplace({axis(dim): index.xreplace({axis(0): axis(dim)})})


@rule("setitem")
def setitem(call: OpCall) -> Expr:
    """x[slices] = value: the value inside the slices, x elsewhere."""
    expr, shape = call.tensor()
    index = call.raw(1)
    items = full_index(index_items(index), len(shape))
    value = call.argument(2)
    inside: list[Expr] = []
    local: dict[Expr, Expr] = {}
    kept = [i for i, item in enumerate(items) if isinstance(item, slice)]
    for i, (item, size) in enumerate(zip(items, shape, strict=True)):
        if isinstance(item, slice):
            begin, end = setitem_bounds(item, size)
            if ((number(size) if end is None else end) - begin).is_nonpositive:
                return expr  # Nothing is assigned.
            if begin != 0:
                inside.append(compare(sympy.Ge, axis(i), begin))
            if end is not None:
                inside.append(compare(sympy.Lt, axis(i), end))
            local[axis(kept.index(i))] = axis(i) - begin
        elif isinstance(item, (int, torch.SymInt)):
            inside.append(compare(sympy.Eq, axis(i), normalize_index(number(item), size)))
        else:
            raise NotUnderstood("assignment by tensor, mask or new dimension")
    if isinstance(value, fx.Node):
        rank = len(call.shape_of(value))
        if rank > len(kept):
            raise NotUnderstood("assignment of a value of more dimensions")
        written = substitute(align(call.read(value), rank, len(kept)), local)
    else:
        written = number(value)
    return select(sympy.And(*inside), cast(written, call.dtype), expr)


def setitem_bounds(item: slice, size: Any) -> tuple[Expr, Expr | None]:
    """First index of a slice and the one after its last; None for the end of the dimension."""
    begin, step = slice_bounds(item, size)
    if step != 1:
        raise NotUnderstood("assignment with a step")
    if item.stop is None:
        return begin, None
    end = normalize_bound(number(item.stop), size)
    return begin, None if (end - number(size)).is_nonnegative else end
