"""Lengths as nodes of a graph: ints, or what computes them from the sizes of the graph's inputs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx
from torch.utils._sympy.functions import Max, Min

from mpass.graph.nodes import value_of
from mpass.graph.site import Length

FOLDS: dict[Any, Callable[..., Any]] = {
    sympy.Add: operator.add,
    sympy.Mul: operator.mul,
    Max: torch.sym_max,
    Min: torch.sym_min,
}
"""What lengths are made by, and the functions that make them in a graph."""


def as_argument(graph: fx.Graph, length: Length | fx.Node) -> int | fx.Node:
    """A length as an op's argument: the int, or a node that computes the SymInt.

    The expression is built from the sizes and symbols that the graph's inputs hold.
    """
    if not isinstance(length, torch.SymInt):
        return length
    return build_expression(graph, length.node.expr)


def build_expression(graph: fx.Graph, expression: sympy.Expr) -> int | fx.Node:
    """Nodes that compute a sympy expression over the shape symbols of a graph."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return find_symbol(graph, expression)
    fold = FOLDS.get(expression.func)
    if fold is None:
        raise LookupError(f"no node of the graph holds the length {expression}")
    parts = [build_expression(graph, argument) for argument in expression.args]
    total = parts[0]
    for part in parts[1:]:
        total = graph.call_function(fold, (total, part))
    return total


def find_symbol(graph: fx.Graph, symbol: sympy.Symbol) -> fx.Node:
    """The input that is a shape symbol, or a new node with the size of a tensor input that is."""
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return graph.call_function(torch.ops.aten.sym_size.int, (node, dim))
    raise LookupError(f"no input of the graph holds the length {symbol}")
