"""How ops on a tensor that is a function of the distance are read: see distances.py."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.arguments import bind, tensor_arguments
from mpass.graph.nodes import is_tensor, op_name, shape_of
from mpass.masks.distances import DistanceReader, Line, NoLineError, Rule
from mpass.masks.elements import is_one
from mpass.masks.expressions import Expr, number
from mpass.masks.rules.indexing import full_index, index_items, slice_bounds

CASTS = frozenset(
    "to type to_copy float double half bfloat16 int long bool contiguous clone detach alias".split()
)
LIKE = frozenset("zeros_like ones_like full_like".split())
PAIRS = frozenset("min max".split())
"""Ops by element on two tensors alone."""

ALIASES = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "invert": "bitwise_not",
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
}
"""Operators' names and those of the aten ops that they are."""


def distance_rule(name: str) -> Rule | None:
    """How an op is read, by its name; None if it is not understood."""
    rule = RULES.get(name)
    if rule is None and (name in CASTS | LIKE | PAIRS or is_by_element(name)):
        return by_element
    return rule


def by_element(lines: DistanceReader, node: fx.Node) -> Line:
    """Each element of the result from those of the operands in the same place."""
    found: dict[fx.Node, Line] = {}
    for tensor in dict.fromkeys(tensor_arguments(node)):
        try:
            found[tensor] = lines.line(tensor, node)
        except NoLineError:
            continue
    places = {(line.query, line.key) for line in found.values()}
    if len(places) != 1:
        raise NoLineError
    if op_name(node) in PAIRS and not (len(node.args) == 2 and is_tensor(node.args[1])):
        raise NoLineError
    (place,) = places
    for tensor in tensor_arguments(node):
        if tensor not in found:
            check_constant(lines, tensor, place)

    def build(shift: Expr) -> fx.Node:
        made = {tensor: line.build(shift) for tensor, line in found.items()}
        args, kwargs = replaced(node, made)
        return lines.again(node, args, kwargs)

    return Line(*place, once(build))


def check_constant(lines: DistanceReader, tensor: fx.Node, place: Iterable[int]) -> None:
    """Raise NoLineError unless a tensor is the same at all positions, and is never written."""
    shape = shape_of(tensor)
    if any(-dim <= len(shape) and not is_one(shape[dim]) for dim in place):
        raise NoLineError
    if lines.reader.writes.ever_written(tensor):
        raise NoLineError


def looked_up(lines: DistanceReader, node: fx.Node) -> Line:
    """A row of a table for each index: torch.nn.functional.embedding."""
    given = bind(node)
    indices, table = given.get("input", given.get("indices")), given.get("weight")
    if not (isinstance(table, fx.Node) and isinstance(indices, fx.Node)) or given.get("max_norm"):
        raise NoLineError
    return indexed(lines, node, table, indices, -1)


def indexed(
    lines: DistanceReader, node: fx.Node, table: fx.Node, indices: fx.Node, moved: int
) -> Line:
    """A table at indices that are a line; its positions move by some dimensions."""
    if lines.reader.writes.ever_written(table):
        raise NoLineError
    line = lines.line(indices, node)

    def build(shift: Expr) -> fx.Node:
        args, kwargs = replaced(node, {indices: line.build(shift)})
        return lines.again(node, args, kwargs)

    return Line(line.query + moved, line.key + moved, once(build))


def item(lines: DistanceReader, node: fx.Node) -> Line:
    """x[...] with None and slices, which may cut positions; or a table at an index."""
    operand, index = node.args
    assert isinstance(operand, fx.Node)
    raw = index_items(index)
    tensors = [each for each in raw if isinstance(each, fx.Node) and is_tensor(each)]
    if tensors:
        others = [each for each in raw if each is not tensors[0]]
        if len(tensors) > 1 or any(each != slice(None) for each in others):
            raise NoLineError
        after = len(shape_of(operand)) - 1 - raw.index(tensors[0])
        return indexed(lines, node, operand, tensors[0], -after)
    line, shape = lines.line(operand, node), shape_of(operand)
    items = full_index(raw, len(shape))
    places: dict[int, int] = {}
    moved: Expr = sympy.Integer(0)
    kept: list[Any] = []
    source, target = 0, 0
    for each in items:
        if each is None:
            kept.append(None)
            target += 1
            continue
        place = source - len(shape)
        if place in (line.query, line.key):
            if not isinstance(each, slice):
                raise NoLineError
            begin, step = slice_bounds(each, shape[source])
            if step != 1:
                raise NoLineError
            moved = moved + (begin if place == line.key else -begin)
            kept.append(slice(None))
            places[place] = target
        else:
            kept.append(each)
        source, target = source + 1, target + isinstance(each, slice)

    def build(shift: Expr) -> fx.Node:
        return lines.call(operator.getitem, line.build(shift + moved), tuple(kept))

    return Line(places[line.query] - target, places[line.key] - target, once(build))


def permuted(lines: DistanceReader, node: fx.Node) -> Line:
    """Dimensions in another order."""
    operand, *rest = node.args
    rank = len(shape_of(node))
    assert isinstance(operand, fx.Node)
    line = lines.line(operand, node)
    order = list(range(rank))
    if op_name(node) == "permute":
        given = rest[0] if len(rest) == 1 and isinstance(rest[0], (list, tuple)) else rest
        dims = node.kwargs.get("dims", given)
        if not isinstance(dims, (list, tuple)):
            raise NoLineError
        order = [dim % rank for dim in dims]
    else:
        pair = [*rest, *node.kwargs.values()]
        if len(pair) != 2 or not all(isinstance(dim, int) for dim in pair):
            raise NoLineError
        first, second = (int(dim) % rank for dim in pair)  # type: ignore[arg-type]
        order[first], order[second] = order[second], order[first]

    def place(dim: int) -> int:
        return order.index(dim + rank) - rank

    def build(shift: Expr) -> fx.Node:
        return lines.call(torch.ops.aten.permute.default, line.build(shift), order)

    return Line(place(line.query), place(line.key), once(build))


def with_unit(lines: DistanceReader, node: fx.Node) -> Line:
    """One more dimension, of the size 1."""
    operand, dim = node.args[0], bind(node).get("dim")
    assert isinstance(operand, fx.Node)
    if not isinstance(dim, int):
        raise NoLineError
    line, rank = lines.line(operand, node), len(shape_of(node))
    dim = dim % rank - rank  # of the result

    def build(shift: Expr) -> fx.Node:
        return lines.call(torch.ops.aten.unsqueeze.default, line.build(shift), dim)

    def place(old: int) -> int:
        return old if old > dim else old - 1

    return Line(place(line.query), place(line.key), once(build))


def repeated(lines: DistanceReader, node: fx.Node) -> Line:
    """Dimensions of the size 1 repeated, and more before them: the line leaves them as they are."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    line = lines.line(operand, node)
    old, new = shape_of(operand), shape_of(node)
    if any(number(old[dim]) != number(new[dim]) for dim in (line.query, line.key)):
        raise NoLineError
    more = len(new) - len(old)

    def build(shift: Expr) -> fx.Node:
        made = line.build(shift)
        return lines.call(operator.getitem, made, (None,) * more + (...,)) if more else made

    return Line(line.query, line.key, once(build))


def reshaped(lines: DistanceReader, node: fx.Node) -> Line:
    """Other leading dimensions, where the last two are those of positions and stay."""
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    line = lines.line(operand, node)
    old, new = shape_of(operand), shape_of(node)
    same = [*map(number, old[-2:])] == [*map(number, new[-2:])]
    if (line.query, line.key) != (-2, -1) or len(new) < 2 or not same:
        raise NoLineError
    leading = list(new[:-2])
    if not all(isinstance(size, int) for size in leading):
        raise NoLineError

    def build(shift: Expr) -> fx.Node:
        return lines.call(torch.ops.aten.reshape.default, line.build(shift), [*leading, 1, -1])

    return Line(-2, -1, once(build))


RULES: dict[str, Rule] = {
    "embedding": looked_up,
    "getitem": item,
    "unsqueeze": with_unit,
    **dict.fromkeys(("permute", "transpose", "swapaxes", "swapdims"), permuted),
    **dict.fromkeys(("expand", "broadcast_to"), repeated),
    **dict.fromkeys(("view", "reshape", "unsafe_view"), reshaped),
}
"""How ops that do not work by element are read, by name."""


def once(build: Callable[[Expr], fx.Node]) -> Callable[[Expr], fx.Node]:
    """The same nodes where a tensor is read twice."""
    made: dict[Expr, fx.Node] = {}

    def known(shift: Expr) -> fx.Node:
        if shift not in made:
            made[shift] = build(shift)
        return made[shift]

    return known


def replaced(node: fx.Node, made: dict[fx.Node, fx.Node]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with other nodes in the place of some."""

    def choose(given: fx.Node) -> fx.Node:
        return made.get(given, given)

    return fx.map_arg(node.args, choose), fx.map_arg(node.kwargs, choose)


def is_by_element(name: str) -> bool:
    """Whether an op computes each element of its result from those in the same place alone."""
    packet = getattr(torch.ops.aten, ALIASES.get(name, name), None)
    if packet is None or not hasattr(packet, "overloads"):
        return False
    tags = [getattr(packet, each).tags for each in packet.overloads()]
    random = any(torch.Tag.nondeterministic_seeded in each for each in tags)
    return not random and any(torch.Tag.pointwise in each for each in tags)
