"""Nodes for what a proof found: the key mask [B, Nk] of a padding term, a length as an argument.

New nodes are dead until a rewrite uses them, and they read small tensors only.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from mpass.graph.nodes import MADE_HERE, example, value_of
from mpass.graph.site import Length
from mpass.masks.conjuncts import MaskSizes
from mpass.masks.elements import is_one
from mpass.masks.expressions import BATCH, KEY, Expr, NotUnderstood, Where, axis, is_truth, number
from mpass.masks.reader import GraphReader

RELATIONS: dict[Any, Callable[..., Any]] = {
    sympy.Eq: torch.eq,
    sympy.Ne: torch.ne,
    sympy.Le: torch.le,
    sympy.Lt: torch.lt,
    sympy.Ge: torch.ge,
    sympy.Gt: torch.gt,
}


LOGIC: dict[Any, Callable[..., Any]] = {
    sympy.And: torch.logical_and,
    sympy.Or: torch.logical_or,
}


def find_key_mask(reader: GraphReader, condition: Expr, sizes: MaskSizes) -> fx.Node | None:
    """A bool [B, Nk] tensor of the graph that is a condition on b and k, if there is one."""
    renamed = {axis(0): BATCH, axis(1): KEY}
    for node, expr in reader.known():
        shape = example(node).shape
        if len(shape) != 2 or example(node).dtype != torch.bool:
            continue
        if (number(shape[0]), number(shape[1])) != (sizes.batch, sizes.keys):
            continue
        if expr.xreplace(renamed) == condition:
            return node
    return None


class Emitter:
    """Writes expressions in b and k as nodes before `at`, each of a shape that [B, Nk] holds.

    keys: the node [B, Hk, Nk, D] that sizes and device are taken from.
    """

    def __init__(self, reader: GraphReader, keys: fx.Node, at: fx.Node) -> None:
        self.reader, self.keys, self.at = reader, keys, at
        self.graph = at.graph

    def key_mask(self, condition: Expr) -> fx.Node:
        """Bool [B, Nk] for a condition on b and k. Raises NotUnderstood for other terms."""
        shape = (self.size(0), self.size(2))
        return self.call(torch.broadcast_to, self.emit(condition), shape)

    def emit(self, expr: Expr) -> Any:
        """A node or a Python number with an expression's value."""
        if expr in (sympy.true, sympy.false):
            return self.call(torch.tensor, bool(expr), device=example(self.keys).device)
        if isinstance(expr, sympy.Integer):
            return int(expr)
        if expr in (BATCH, KEY):
            return self.positions(expr)
        if isinstance(expr, (sympy.And, sympy.Or)):
            return self.chain(LOGIC[expr.func], expr.args)
        if isinstance(expr, sympy.Not):
            return self.call(torch.logical_not, self.emit(expr.args[0]))
        if type(expr) in RELATIONS:
            return self.relation(RELATIONS[type(expr)], *expr.args)
        if isinstance(expr, (sympy.Add, sympy.Mul)) and expr.has(BATCH, KEY, AppliedUndef):
            function = operator.add if isinstance(expr, sympy.Add) else operator.mul
            return self.chain(function, expr.args)
        if isinstance(expr, sympy.floor):
            top, bottom = sympy.fraction(sympy.together(expr.args[0]))
            return self.call(operator.floordiv, self.emit(top), self.emit(bottom))
        if isinstance(expr, sympy.Mod):
            return self.call(operator.mod, *map(self.emit, expr.args))
        if isinstance(expr, Where):
            return self.call(torch.where, *map(self.emit, expr.args))
        if isinstance(expr, AppliedUndef):
            return self.element(expr)
        return self.length(expr)

    def chain(self, function: Callable[..., Any], args: tuple[Expr, ...]) -> Any:
        """A binary op over two or more expressions."""
        result = self.emit(args[0])
        for arg in args[1:]:
            result = self.call(function, result, self.emit(arg))
        return result

    def relation(self, function: Callable[..., Any], left: Expr, right: Expr) -> fx.Node:
        """A comparison; torch's functions take a tensor first."""
        if is_truth(left) or is_truth(right):
            raise NotUnderstood("comparison of truth values")
        first, second = self.emit(left), self.emit(right)
        if not isinstance(first, fx.Node) or isinstance(value_of(first), torch.SymInt):
            first = self.call(torch.full, (), first, device=example(self.keys).device)
        return self.call(function, first, second)

    def element(self, atom: Expr) -> fx.Node:
        """An input tensor at indices that are expressions in b and k."""
        node = self.reader.sources.get(atom.func.__name__)
        if node is None or node.graph is not self.graph:
            raise NotUnderstood(f"{atom} is not a tensor of the graph")
        if self.reader.writes.ever_written(node):
            raise NotUnderstood(f"{atom} is written in place")
        shape = example(node).shape
        sizes = (example(self.keys).shape[0], example(self.keys).shape[2])
        node = self.widened(node)
        if atom.args == (BATCH, KEY) and [*map(number, shape)] == [*map(number, sizes)]:
            return node
        if atom.args == (KEY,) and [*map(number, shape)] == [number(sizes[1])]:
            return node
        remaining = list(atom.args)
        index: list[Any] = []
        for dim, size in enumerate(shape):
            if is_one(size):
                index.append(0)
                continue
            place = self.emit(remaining.pop(0))
            if isinstance(place, fx.Node) and isinstance(value_of(place), torch.Tensor):
                last = self.call(operator.sub, self.call(torch.ops.aten.sym_size.int, node, dim), 1)
                place = self.call(torch.clamp, place, 0, last)
            index.append(place)
        return self.call(operator.getitem, node, tuple(index))

    def widened(self, node: fx.Node) -> fx.Node:
        """An input in the widest dtype of its kind: expressions know no dtype that wraps or rounds.

        An index of bytes would be a mask besides.
        """
        dtype = example(node).dtype
        if dtype in (torch.bool, torch.int64, torch.float64):
            return node
        wide = torch.float64 if dtype.is_floating_point else torch.int64
        return self.call(torch.ops.aten.to.dtype, node, wide)

    def positions(self, symbol: Expr) -> fx.Node:
        """Indices along the batch [B, 1] or along the keys [Nk]."""
        device = example(self.keys).device
        size = self.size(0 if symbol == BATCH else 2)
        node = self.call(torch.arange, size, device=device)
        return self.call(torch.unsqueeze, node, 1) if symbol == BATCH else node

    def size(self, dim: int) -> Any:
        """A size of the keys as an int, or a node for it."""
        size = example(self.keys).shape[dim]
        if isinstance(size, int):
            return size
        return self.call(torch.ops.aten.sym_size.int, self.keys, dim)

    def length(self, expr: Expr) -> Any:
        """A node that stands for an expression of sizes."""
        node = length_node(self.graph, expr, self.at)
        if node is not None:
            return node
        if isinstance(expr, (sympy.Add, sympy.Mul)):
            function = operator.add if isinstance(expr, sympy.Add) else operator.mul
            return self.chain(function, expr.args)
        raise NotUnderstood(f"no node for {expr}")

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new node before `at`, with its example value."""
        with self.graph.inserting_before(self.at):
            node = self.graph.call_function(function, args, kwargs)
        node.meta["example_value"] = self.example_of(node)
        node.meta[MADE_HERE] = True
        return node

    def example_of(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, value_of)
        kwargs = fx.map_arg(node.kwargs, value_of)
        keys = example(self.keys)
        function: Any = node.target
        if isinstance(keys, FakeTensor):
            with keys.fake_mode:
                return function(*args, **kwargs)
        return function(*args, **kwargs)


def length_node(graph: fx.Graph, expr: Expr, before: fx.Node) -> fx.Node | None:
    """The first node before another that stands for an expression of sizes."""
    for node in graph.nodes:
        if node is before:
            return None
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == expr:
            return node
    return None


def as_length(expr: Expr, like: Sequence[Length]) -> Length | None:
    """A size expression as an int or a SymInt of the same shape environment; None for others."""
    if isinstance(expr, sympy.Integer):
        return int(expr)
    if expr.atoms(AppliedUndef):
        return None
    for size in like:
        if isinstance(size, torch.SymInt):
            if size.node.expr == expr:
                return size
            shape_env = size.node.shape_env
            return shape_env.create_symintnode(expr, hint=None)
    return None
