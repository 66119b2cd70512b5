"""What every node that a rewrite adds needs: where it comes from, and its value while compiling."""

from __future__ import annotations

from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

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


def propagate(node: fx.Node, origin: fx.Node) -> None:
    """Give a new node its fake value, computed from those of its arguments; adds no guards."""
    if value_of(node) is not None or node.op not in ("call_function", "call_method"):
        return
    if not isinstance(example(origin), FakeTensor):
        return
    if any(value_of(argument) is None for argument in node.all_input_nodes):
        raise LookupError(f"an argument of {node.name} has no fake value")
    node.meta[value_key(origin)] = run_fake(node, {})
