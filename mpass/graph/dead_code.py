"""Removing what nobody can notice from a graph."""

from __future__ import annotations

from torch import fx

from mpass.graph.writes import StorageWrites, storage_of, written_by


def remove_dead(graph: fx.Graph) -> int:
    """Erase nodes that nothing can notice; how many.

    fx's own elimination takes in-place methods for pure and would drop the update of a cache. Here
    a write lives if the memory that it writes is an input's, or is read by a node that lives.
    """
    writes = StorageWrites(graph)
    external = {
        storage_of(node) for node in graph.nodes if node.op in ("placeholder", "get_attr")
    } | {None}
    pending = [node for node in graph.nodes if is_noticed(node, external)]
    live: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in live:
            continue
        live.add(node)
        pending += node.all_input_nodes
        for tensor in (node, *node.all_input_nodes):
            pending += writes.writes_to(tensor)
    dead = [node for node in reversed(graph.nodes) if node not in live]
    for node in dead:
        graph.erase_node(node)
    return len(dead)


def is_noticed(node: fx.Node, external: set[int | None]) -> bool:
    """Whether a node has an effect beyond its value and beyond the graph's own memory."""
    if node.op in ("placeholder", "output"):
        return True
    written = written_by(node)
    if written:
        return any(storage_of(target) in external for target in written)
    return bool(node.is_impure())
