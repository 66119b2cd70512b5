"""A graph as it was, to go back to: noted before passes edit it, and built only where one fails.

Nodes are edited by giving them other arguments, never by changing what their arguments hold (fx
keeps these immutable), so noting them is enough; a whole second graph costs a tenth of all passes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx


@dataclass(frozen=True)
class NodeNote:
    """All that makes up one node, as it was; `meta` is a copy."""

    node: fx.Node
    op: str
    name: str
    target: Any
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    type: Any
    meta: dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """The nodes of a graph in their order, and how its code is generated."""

    notes: tuple[NodeNote, ...]
    codegen: Any

    def restored(self) -> fx.Graph:
        """A new graph of new nodes that is what the noted one was."""
        graph = fx.Graph()
        nodes: dict[fx.Node, fx.Node] = {}
        for note in self.notes:
            args: Any = fx.map_arg(note.args, nodes.__getitem__)
            kwargs: Any = fx.map_arg(dict(note.kwargs), nodes.__getitem__)
            made = graph.create_node(note.op, note.target, args, kwargs, note.name, note.type)
            made.meta = dict(note.meta)
            nodes[note.node] = made
        graph._codegen = self.codegen
        return graph


def snapshot(graph: fx.Graph) -> Snapshot:
    """Note a graph. It may be edited then; its nodes' values must not be changed in place."""
    notes = tuple(
        NodeNote(n, n.op, n.name, n.target, n.args, n.kwargs, n.type, dict(n.meta))
        for n in graph.nodes
    )
    return Snapshot(notes, graph._codegen)
