"""What a graph writes in place, and when: reading a tensor later than its maker needs this.

Tensors that share memory share the storage of their fake tensors, so a write through one view is
seen as a write to all of them. An op that might write counts as one that does.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload

from mpass.graph.nodes import value_of

INPLACE_OPERATORS = frozenset(
    getattr(operator, name)
    for name in (
        "iadd isub imul imatmul itruediv ifloordiv imod ipow iand ior ixor ilshift irshift setitem"
    ).split()
)

KEYWORD_OPERATORS = frozenset({operator.and_, operator.or_, operator.not_, operator.is_})
"""Named with an underscore because their name is a keyword, not because they write."""

PURE_METHODS = frozenset({"requires_grad_"})

INPLACE_POSITION = {"dropout": 3, "relu": 1, "silu": 1, "elu": 2, "hardtanh": 3, "threshold": 3}
"""Where functions of torch.nn.functional take `inplace` positionally."""


class StorageWrites:
    """The writes of a graph by storage, and the order of its nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[fx.Node]] = {}
        for node in graph.nodes:
            for target in written_by(node):
                storage = storage_of(target)
                if storage is not None:
                    self._writes.setdefault(storage, []).append(node)

    def last_write(self, node: fx.Node, before: int) -> fx.Node | None:
        """The last write to a tensor's memory since its node ran, of those before a position.

        The node itself is returned if it is an in-place op and nothing wrote after it.
        """
        start = self.position[node]
        for write in reversed(self._writes.get(storage_of(node), ())):  # type: ignore[arg-type]
            if start <= self.position[write] < before:
                return write
        return None

    def written_between(self, node: fx.Node, start: fx.Node, stop: fx.Node) -> bool:
        """Whether a tensor's memory is written after `start` ran and before `stop` runs."""
        first, last = self.position[start], self.position[stop]
        writes = self._writes.get(storage_of(node), ())  # type: ignore[arg-type]
        return any(first < self.position[write] < last for write in writes)

    def writes_to(self, node: fx.Node) -> list[fx.Node]:
        """All writes to a tensor's memory."""
        storage = storage_of(node)
        return [] if storage is None else self._writes.get(storage, [])

    def ever_written(self, node: fx.Node) -> bool:
        """Whether anything in the graph writes to a tensor's memory."""
        return storage_of(node) in self._writes


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory that a node's tensor lives in; None if the node is no tensor."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except NotImplementedError:  # a batched tensor inside of vmap has none
        return None


def written_by(node: fx.Node) -> list[fx.Node]:
    """The arguments that a node writes to, or might."""
    if node.op == "call_method":
        name = str(node.target)
        inplace = name.endswith("_") and not name.endswith("__") and name not in PURE_METHODS
        return first_argument(node) if inplace or name == "__setitem__" else []
    if node.op != "call_function":
        return []
    target: Any = node.target
    written = list(nodes_in(node.kwargs.get("out")))
    if isinstance(target, OpOverload):
        return written + schema_writes(node, target)
    if isinstance(target, HigherOrderOperator):
        return node.all_input_nodes if subgraphs_write(node) else []
    name = getattr(target, "__name__", "")
    position = INPLACE_POSITION.get(name)
    inplace = (
        target in INPLACE_OPERATORS
        or (name.endswith("_") and not name.endswith("__") and target not in KEYWORD_OPERATORS)
        or bool(node.kwargs.get("inplace"))
        or (position is not None and len(node.args) > position and bool(node.args[position]))
    )
    return written + first_argument(node) if inplace else written


def first_argument(node: fx.Node) -> list[fx.Node]:
    first = node.args[0] if node.args else None
    return [first] if isinstance(first, fx.Node) else []


def schema_writes(node: fx.Node, target: OpOverload) -> list[fx.Node]:
    """The arguments that an operator's schema marks as written."""
    written: list[fx.Node] = []
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        written.extend(nodes_in(value))
    return written


def subgraphs_write(node: fx.Node) -> bool:
    """Whether a higher-order op writes to its arguments: its sub-graphs do, or it has none."""
    owner = node.graph.owning_module
    inputs = (arg for arg in node.all_input_nodes if arg.op == "get_attr")
    attributes = (getattr(owner, str(arg.target), None) for arg in inputs)
    graphs = [module.graph for module in attributes if isinstance(module, fx.GraphModule)]
    if not graphs:
        return True
    return any(written_by(inner) for graph in graphs for inner in graph.nodes)


def nodes_in(value: object) -> Iterator[fx.Node]:
    """The nodes of an argument, which may be a nested list."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)
