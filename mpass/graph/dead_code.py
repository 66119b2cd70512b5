"""Removing from a graph what a rewrite left without a reader, and nothing else.

Nodes that were dead before, or that seem to do nothing (functorch's levels, modes, random numbers),
are none of a rewrite's business: they stay.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import fx

from mpass.graph.nodes import MADE_HERE
from mpass.graph.observation import Effects, observe
from mpass.graph.writes import StorageWrites

MAX_UNREAD = 8
"""Calls in a row that are looked through for a reader."""


def remove_dead(graph: fx.Graph, replaced: Iterable[fx.Node] = ()) -> int:
    """Erase what only `replaced` nodes, whose uses others took over, needed; how many.

    From there on backwards, a node goes if nothing reads it and it was proven to have no effect but
    its value and writes to memory that the graph itself made and no node reads that stays.
    """
    roots = {node for node in replaced if not node.users}
    writes = StorageWrites(graph)
    candidates = find_candidates(graph, roots, writes)
    external = external_memory(graph, roots, writes)
    pending: list[fx.Node] = []
    for node in graph.nodes:
        if node not in candidates or (node not in roots and is_noticed(node, external, writes)):
            pending.append(node)
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


def is_unread(
    node: fx.Node, effects_of: Callable[[fx.Node], Effects] = observe, depth: int = MAX_UNREAD
) -> bool:
    """Whether nobody could notice if a call and all that is computed from it were left out."""
    if node.op not in ("call_function", "call_method") or depth == 0:
        return False
    effects = effects_of(node)
    if not effects.known or not effects.pure or effects.writes or effects.reshapes:
        return False
    return all(is_unread(user, effects_of, depth - 1) for user in node.users)


def find_candidates(graph: fx.Graph, roots: set[fx.Node], writes: StorageWrites) -> set[fx.Node]:
    """What the roots and the unused nodes that the backend made read, with what writes to it."""
    unused = [node for node in graph.nodes if MADE_HERE in node.meta and not node.users]
    effects_of = writes.effects.__getitem__
    found: set[fx.Node] = set()
    pending = [*roots, *unused]
    while pending:
        node = pending.pop()
        if node in found or node.op in ("placeholder", "output"):
            continue
        found.add(node)
        pending += node.all_input_nodes
        pending += writes.writes_to(node)
        # The other results of an op that gives several.
        pending += [user for user in node.users if not user.users and user.op != "output"]
        # Copies kept for statistics that nobody reads, and what is computed from them.
        pending += [
            user for user in node.users if user not in found and is_unread(user, effects_of)
        ]
    return found


def external_memory(graph: fx.Graph, roots: set[fx.Node], writes: StorageWrites) -> set[int]:
    """Storages that outlive the graph, and those whose writes now go to a root's replacement."""
    found: set[int] = set()
    for node in graph.nodes:
        if node.op in ("placeholder", "get_attr") or node in roots:
            found |= writes.memory_of(node) or set()
    return found


def is_noticed(node: fx.Node, external: set[int], writes: StorageWrites) -> bool:
    """Whether a node has an effect beyond its value and beyond the graph's own memory."""
    if node.op in ("placeholder", "output"):
        return True
    effects = writes.effects[node]
    if not effects.known or not effects.pure:
        return True
    for target in writes.written_by(node):
        memory = writes.memory_of(target)
        if memory is None or not memory or memory & external:
            return True
    return not effects.writes and bool(node.is_impure())
