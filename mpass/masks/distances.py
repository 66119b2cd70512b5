"""Tensors that depend on positions by the distance between key and query alone, as their lines.

T5 looks up a bias for each pair in a table, by a bucket of `k - q`; ALiBi both ways multiplies
`|k - q|` with slopes. Whatever the ops are: where one of them reads `k - q + c` (masks/reader.py)
and all others work by element, look up, or move dimensions, the result is a function of the
distance. The same ops on a line of all distances, whose query dimension has the size 1, give each
of its values once: O(N) instead of O(N^2), and what no other op reads of the whole is dead.

Letters: B batch, H heads, Nq queries, Nk keys, L = Nq + Nk - 1 distances.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.layouts import run_fake
from mpass.graph.lengths import build_expression
from mpass.graph.new_nodes import nodes_between
from mpass.graph.nodes import INPLACE_NAMES, MADE_HERE, example, is_tensor, op_name, shape_of
from mpass.masks.expressions import Expr, NotUnderstood, axis, is_truth
from mpass.masks.reader import GraphReader

MAX_OPS = 80
"""Ops between positions and a bias beyond which it is not read: T5's buckets take 25."""


class NoLineError(Exception):
    """A tensor is not known to be a function of the distance between query and key."""


@dataclass(frozen=True)
class Line:
    """A tensor whose elements depend on positions by `k - q` alone.

    query, key: its dimensions of positions, counted from the last one (negative). build: makes it
    by new nodes for the distances of the line moved by a number; its query dimension has the size
    1 then, and so may dimensions that are repeated.
    """

    query: int
    key: int
    build: Callable[[Expr], fx.Node]


class DistanceReader:
    """Reads one tensor of a graph as a line, for attention of some numbers of queries and keys.

    rule_of: how an op is read, by its name; before: new nodes are put there; like: a tensor on the
    device of the positions.
    """

    def __init__(
        self,
        reader: GraphReader,
        rule_of: Callable[[str], Rule | None],
        before: fx.Node,
        queries: Expr,
        keys: Expr,
        like: torch.Tensor,
    ) -> None:
        self.reader, self.rule_of, self.before, self.like = reader, rule_of, before, like
        self.queries, self.keys = queries, keys
        self._known: dict[fx.Node, Line | None] = {}

    def line(self, node: fx.Node, at: fx.Node) -> Line:
        """A tensor as another node sees it. Raises NoLineError where it is none."""
        if node not in self._known:
            if len(self._known) >= MAX_OPS:
                raise NoLineError
            self._known[node] = None
            with contextlib.suppress(NoLineError, NotUnderstood):
                self._known[node] = self._read(node, at)
        found = self._known[node]
        if found is None:
            raise NoLineError
        return found

    def _read(self, node: fx.Node, at: fx.Node) -> Line:
        called = node.op in ("call_function", "call_method") and "out" not in node.kwargs
        if not called or not is_tensor(node):
            raise NoLineError
        writes = self.reader.writes
        if writes.last_write(node, writes.position[at]) not in (None, node):
            raise NoLineError
        start = self._positions(node, at)
        if start is not None:
            return start
        rule = self.rule_of(op_name(node))
        if rule is None:
            raise NoLineError
        return rule(self, node)

    def _positions(self, node: fx.Node, at: fx.Node) -> Line | None:
        """A tensor that is `k - q + c`, or minus that, with q along the earlier dimension."""
        rank, dtype = len(shape_of(node)), example(node).dtype
        expr = self.reader.read(node, at)
        if is_truth(expr) or not expr.is_integer or expr.atoms(AppliedUndef):
            return None
        places = [place for place in range(rank) if expr.has(axis(place))]
        if len(places) != 2:
            return None
        expr = sympy.expand(expr)
        query, key = places
        sign = expr.coeff(axis(key))
        rest = sympy.expand(expr - sign * (axis(key) - axis(query)))
        if sign not in (1, -1) or rest.has(axis(key), axis(query)):
            return None

        def build(shift: Expr) -> fx.Node:
            first = rest + sign * (shift - (self.queries - 1))
            span = self.size(self.queries + self.keys - 1)
            steps = self.call(torch.arange, span, device=self.like.device)
            if sign == -1:
                steps = self.call(operator.neg, steps)
            moved = self.call(operator.add, steps, self.size(first))
            shape = [-1 if place == key else 1 for place in range(rank)]
            shaped = self.call(torch.ops.aten.view.default, moved, shape)
            return self.call(torch.ops.aten.to.dtype, shaped, dtype)

        return Line(query - rank, key - rank, build)

    # -- new nodes ----------------------------------------------------------------------------

    def size(self, expr: Expr) -> int | fx.Node:
        """An expression of sizes as an argument; its nodes have their values."""
        expr = sympy.expand(expr)
        if expr.is_Integer:
            return int(expr)
        last = self.before.prev
        with self.before.graph.inserting_before(self.before):
            node = build_expression(self.before.graph, expr)
        for made in nodes_between(last, self.before):
            self._evaluate(made)
        return node

    def call(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        """A new call of a function."""
        with self.before.graph.inserting_before(self.before):
            node = self.before.graph.call_function(function, args, kwargs)
        return self._evaluate(node)

    def again(self, node: fx.Node, args: Sequence[Any], kwargs: dict[str, Any]) -> fx.Node:
        """The same call on other arguments, which it does not write to; of the same dtype."""
        graph = self.before.graph
        with graph.inserting_before(self.before):
            if node.op == "call_method":
                name = str(node.target)
                plain = name if name.startswith("__") else name.rstrip("_")
                made = graph.call_method(plain, tuple(args), kwargs)
            else:
                made = graph.call_function(without_writing(node.target), tuple(args), kwargs)
        self._evaluate(made)
        if example(made).dtype != example(node).dtype:
            made = self.call(torch.ops.aten.to.dtype, made, example(node).dtype)
        return made

    def _evaluate(self, node: fx.Node) -> fx.Node:
        node.meta[MADE_HERE] = True
        with getattr(self.like, "fake_mode", contextlib.nullcontext()):
            node.meta["example_value"] = run_fake(node, {})
        return node


Rule = Callable[[DistanceReader, fx.Node], Line]


def without_writing(target: Any) -> Any:
    """An operator for an assignment like `x += y` as one that makes a new tensor."""
    name = getattr(target, "__name__", "")
    if name in INPLACE_NAMES and getattr(target, "__module__", "") == "_operator":
        return getattr(operator, name[1:] if name[1:] not in ("and", "or") else f"{name[1:]}_")
    return target
