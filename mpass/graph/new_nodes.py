"""What every node that a rewrite adds needs: where it comes from, and its value while compiling."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

from mpass.graph.layouts import run_fake
from mpass.graph.nodes import example, value_of


def copy_meta(origin: fx.Node, node: fx.Node) -> None:
    """Keep where a node comes from (module stack, stack trace), not what its value was."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", "seq_nr"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]


def value_key(origin: fx.Node) -> str:
    """Where nodes of a graph keep their fake value: Dynamo's and exported graphs differ."""
    return "val" if "val" in origin.meta and "example_value" not in origin.meta else "example_value"


def nodes_between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """The nodes after one and before another, in order; all that a plan adds stands together."""
    found: list[fx.Node] = []
    node = last.prev
    while node is not first:
        found.append(node)
        node = node.prev
    return found[::-1]


def propagate(node: fx.Node, origin: fx.Node) -> None:
    """Give a new node its fake value, computed from those of its arguments; adds no guards."""
    if value_of(node) is not None or node.op not in ("call_function", "call_method"):
        return
    if not isinstance(example(origin), FakeTensor):
        return
    if any(value_of(argument) is None for argument in node.all_input_nodes):
        raise LookupError(f"an argument of {node.name} has no fake value")
    node.meta[value_key(origin)] = item(node) if is_item(node) else run_fake(node, {})


def is_item(node: fx.Node) -> bool:
    """Whether a node picks one of the results of an op by its number: nothing has to be run."""
    if node.target is not operator.getitem or len(node.args) != 2 or node.kwargs:
        return False
    whole, place = node.args
    return isinstance(whole, fx.Node) and type(place) is int and is_several(value_of(whole))


def is_several(value: object) -> bool:
    return isinstance(value, (tuple, list))


def item(node: fx.Node) -> object:
    """The result that such a node picks."""
    whole: Any = node.args[0]
    return value_of(whole)[node.args[1]]
