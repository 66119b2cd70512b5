"""Graphs as text: readable code with shapes, and the difference in calls between two graphs."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from mpass.graph.nodes import value_of


def readable(gm: fx.GraphModule) -> str:
    """A graph as Python code with shapes, strides and devices, nodes made by passes included."""
    shown = with_shapes(gm)
    text: str = shown.print_readable(print_output=False, include_stride=True, include_device=True)
    return text if text.endswith("\n") else text + "\n"


def with_shapes(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes without an example value get one from their op's fake implementation.

    A copy, because what is printed must not change what is compiled: not even a node's meta.
    """
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    if output is not None:
        graph.output(output)
    copy = fx.GraphModule(gm, graph, class_name=type(gm).__name__)
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and value_of(node) is None:
            node.meta["example_value"] = fake_result(node)
    return copy


def fake_result(node: fx.Node) -> Any:
    """What a call gives on the example values of its arguments; None if they do not tell."""
    args = fx.map_arg(node.args, value_of)
    kwargs = fx.map_arg(node.kwargs, value_of)
    if any(value_of(argument) is None for argument in node.all_input_nodes):
        return None
    try:
        with torch.no_grad(), without_guards(node):
            if node.op == "call_method":
                return getattr(args[0], str(node.target))(*args[1:], **kwargs)
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception:  # a picture without this shape is better than none
        return None


@contextlib.contextmanager
def without_guards(node: fx.Node) -> Iterator[None]:
    """Evaluate without adding guards to the shapes that the node's arguments have."""
    for argument in node.all_input_nodes:
        env = getattr(getattr(value_of(argument), "fake_mode", None), "shape_env", None)
        if env is not None:
            with env.suppress_guards():
                yield
            return
    yield


def full_op_name(node: fx.Node) -> str:
    """What a node calls: `aten.add.Tensor`, `torch.nn.functional.silu`, `.view`; "" for no call."""
    if node.op == "call_method":
        return f".{node.target}"
    if node.op == "call_module":
        return f"module {node.target}"
    if node.op != "call_function":
        return ""
    if isinstance(node.target, torch._ops.OpOverload):
        return str(node.target)
    module = getattr(node.target, "__module__", None) or ""
    name = getattr(node.target, "__name__", str(node.target))
    return f"{module}.{name}".replace("_operator.", "operator.").strip(".")


def count_ops(gm: fx.GraphModule) -> Counter[str]:
    """Calls of a graph by name."""
    return Counter(name for node in gm.graph.nodes if (name := full_op_name(node)))


def op_changes(before: Mapping[str, int], after: Mapping[str, int]) -> list[tuple[str, int, int]]:
    """Names whose number of calls changed: (name, before, after), by name."""
    names = sorted(set(before) | set(after))
    pairs = [(name, before.get(name, 0), after.get(name, 0)) for name in names]
    return [(name, old, new) for name, old, new in pairs if old != new]


def op_difference(before: Counter[str], after: Counter[str]) -> str:
    """The changes in words, one line each: `aten.foo: 12 -> 4 (-8)`."""
    changes = op_changes(before, after)
    lines = [f"{name}: {old} -> {new} ({new - old:+d})" for name, old, new in changes]
    lines.append(
        f"all calls: {before.total()} -> {after.total()} ({after.total() - before.total():+d})"
    )
    return "\n".join(lines) + "\n"
