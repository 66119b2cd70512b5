"""What every node that a rewrite adds needs: where it comes from, and its value while compiling."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor

from mpass.graph.call_keys import Unobservable, exact_key
from mpass.graph.layouts import run_fake
from mpass.graph.nodes import example, value_of

ORIGIN = (
    *("nn_module_stack", "stack_trace", "source_fn_stack", "custom", "seq_nr"),
    *("recompute", "ac_graph_id"),
)


def copy_meta(origin: fx.Node, node: fx.Node) -> None:
    """Keep where a node comes from (module stack, stack trace), not what its value was.

    It also keeps which activation checkpoint recomputes it, if one does.
    """
    for key in ORIGIN:
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


Known = dict[Any, object]
"""Fake values of the calls of one rewrite, by `value_of_call`: layers are mostly equal."""


def propagate(node: fx.Node, origin: fx.Node, known: Known | None = None) -> None:
    """Give a new node its fake value, computed from those of its arguments; adds no guards.

    known: where it is looked up first, and entered; equal calls then share one value.
    """
    if value_of(node) is not None or node.op not in ("call_function", "call_method"):
        return
    if not isinstance(example(origin), FakeTensor):
        return
    if any(value_of(argument) is None for argument in node.all_input_nodes):
        raise LookupError(f"an argument of {node.name} has no fake value")
    if is_item(node):
        node.meta[value_key(origin)] = item(node)
        return
    key = None if known is None else equal_call(node)
    if known is None or key is None:
        value = run_fake(node, {})
    else:
        if key not in known:
            known[key] = run_fake(node, {})
        value = known[key]
    node.meta[value_key(origin)] = value


RECORDED_BY = frozenset({"layer", "site"})
"""Parameters of our ops that name the attention in records, and change nothing of a result."""


def equal_call(node: fx.Node) -> Any:
    """A key that calls of our ops with equal fake values have; None for other calls.

    Only ops whose results are new memory, so that a shared value says of no two tensors of the
    program that they are one: nothing writes to what these ops give.
    """
    target = node.target
    if not isinstance(target, OpOverload) or target.namespace != "minference":
        return None
    schema = target._schema
    if any(part.alias_info is not None for part in (*schema.arguments, *schema.returns)):
        return None
    named = zip((argument.name for argument in schema.arguments), node.args, strict=False)
    given = {**dict(named), **node.kwargs}
    try:
        return target, exact_key({k: v for k, v in given.items() if not is_record(k, v)})
    except Unobservable:
        return None


def is_record(name: str, value: object) -> bool:
    """Whether an argument only names the attention; a field of a pattern is a list."""
    return name in RECORDED_BY and isinstance(value, int)


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
