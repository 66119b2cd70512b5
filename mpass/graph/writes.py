"""What a graph writes in place, and when: reading a tensor later than its maker needs this.

Tensors that share memory share the storage of their fake tensors, so a write through one view is
seen as a write to all of them. What a node writes is observed (mpass.graph.observation); what
cannot be observed counts as a write to all tensors that the node is given.
"""

from __future__ import annotations

from bisect import bisect_left

import torch
from torch import fx

from mpass.graph.call_keys import storages_in, tensor_nodes, tensors_in
from mpass.graph.nodes import value_of
from mpass.graph.observation import Effects, observe

SAME_MEMORY = "minference_same_memory"
"""Key of a node's meta: a value in whose memory the node's own tensor lies too.

A sub-graph that was inlined has example values of its own; its results are the call's results.
"""


class StorageWrites:
    """The writes of a graph by storage, and the order of its nodes."""

    def __init__(self, graph: fx.Graph) -> None:
        self.position = {node: index for index, node in enumerate(graph.nodes)}
        self._joined: dict[int, int] = {}
        self._memory: dict[fx.Node, tuple[object, set[int] | None]] = {}
        self._writes: dict[int, list[fx.Node]] = {}
        self._anywhere: list[fx.Node] = []
        self._reshaped: dict[int, fx.Node] = {}
        for node in graph.nodes:
            if SAME_MEMORY in node.meta:
                self._join(node)
        self.effects: dict[fx.Node, Effects] = {}
        self._written: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            effects = self.effects[node] = observe(node)
            targets = written_by(node, effects)
            if targets:
                self._written[node] = targets
            for target in targets:
                self._record(node, target)
            for target in reshaped_by(node, effects):
                for reshaped in (node, target):
                    self._reshaped.setdefault(id(value_of(reshaped)), node)

    def _join(self, node: fx.Node) -> None:
        """Take two storages for one."""
        own = storages_in(value_of(node)) | storages_in(node.meta[SAME_MEMORY])
        roots = {self._root(storage) for storage in own}
        for root in roots:
            self._joined[root] = min(roots)

    def _root(self, storage: int) -> int:
        while self._joined.get(storage, storage) != storage:
            storage = self._joined[storage]
        return storage

    def _record(self, node: fx.Node, target: fx.Node) -> None:
        storages = self.memory_of(target)
        if storages is None:
            if not self._anywhere or self._anywhere[-1] is not node:
                self._anywhere.append(node)
            return
        for storage in storages:
            writes = self._writes.setdefault(storage, [])
            if not writes or writes[-1] is not node:
                writes.append(node)

    def memory_of(self, node: fx.Node) -> set[int] | None:
        """The storages of a node's tensors, none for a number; None if they are not known."""
        value = value_of(node)
        before, known = self._memory.get(node, (None, None))
        if value is not None and before is value:
            return known
        storages = memory_of(node)
        if storages is not None and self._joined:
            storages = {self._root(storage) for storage in storages}
        self._memory[node] = value, storages
        return storages

    def written_by(self, node: fx.Node) -> list[fx.Node]:
        """The arguments that a node writes to, or might."""
        return self._written.get(node, [])

    def last_write(self, node: fx.Node, before: int) -> fx.Node | None:
        """The last write to a tensor's memory since its node ran, of those before a position.

        The node itself is returned if it is an in-place op and nothing wrote after it.
        """
        start = self.position[node]
        found: fx.Node | None = None
        for writes in self._lists(node):
            place = bisect_left(writes, before, key=self.position.__getitem__) - 1
            if place < 0 or self.position[writes[place]] < start:
                continue
            if found is None or self.position[found] < self.position[writes[place]]:
                found = writes[place]
        return found

    def written_between(self, node: fx.Node, start: fx.Node, stop: fx.Node) -> bool:
        """Whether a tensor's memory is written after `start` ran and before `stop` runs."""
        first, last = self.position[start], self.position[stop]
        return any(first < self.position[write] < last for write in self.writes_to(node))

    def writes_to(self, node: fx.Node) -> list[fx.Node]:
        """All writes to a tensor's memory."""
        return [write for writes in self._lists(node) for write in writes]

    def ever_written(self, node: fx.Node) -> bool:
        """Whether anything in the graph writes to a tensor's memory."""
        return any(self._lists(node))

    def reshaped(self, node: fx.Node) -> fx.Node | None:
        """A node that changes the sizes of another's tensor in place, whose example then lies."""
        return self._reshaped.get(id(value_of(node))) if value_of(node) is not None else None

    def _lists(self, node: fx.Node) -> list[list[fx.Node]]:
        """Lists of writes to a node's memory, each in the order of the graph."""
        storages = self.memory_of(node)
        if storages is None:
            return [*self._writes.values(), self._anywhere]
        if not storages:
            return []
        found = [self._writes[storage] for storage in storages if storage in self._writes]
        return [*found, self._anywhere]


def memory_of(node: fx.Node) -> set[int] | None:
    """The storages of a node's tensors, none for a number; None if they are not known.

    A call without an example value gives no tensor (a mode, the result of `x[i] = y`), or is new
    and may give a view of what it reads.
    """
    value = value_of(node)
    if value is None and node.op == "get_attr":
        value = attribute_of(node)
    if value is None:
        if node.op in ("placeholder", "get_attr"):
            return None
        found: set[int] = set()
        for argument in node.all_input_nodes:
            storages = memory_of(argument)
            if storages is None:
                return None
            found |= storages
        return found
    storages = storages_in(value)
    return None if not storages and any(True for _ in tensors_in(value)) else storages


def attribute_of(node: fx.Node) -> object:
    """What a get_attr node reads from the graph's module; None if it is not there."""
    value: object = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part, None)
    return value


def storage_of(node: fx.Node) -> int | None:
    """Identity of the memory that a node's tensor lives in; None if there is no such one."""
    if not isinstance(value_of(node), torch.Tensor):
        return None
    storages = storages_in(value_of(node))
    return next(iter(storages)) if len(storages) == 1 else None


def written_by(node: fx.Node, effects: Effects | None = None) -> list[fx.Node]:
    """The arguments that a node writes to, or might; `effects` are its own, if they are known."""
    effects = observe(node) if effects is None else effects
    if effects.known and not effects.writes:
        return []
    places = tensor_nodes(node)
    if effects.known:
        return list(dict.fromkeys(places[place] for place in sorted(effects.writes)))
    return [arg for arg in dict.fromkeys(places) if memory_of(arg) != set()]


def reshaped_by(node: fx.Node, effects: Effects) -> list[fx.Node]:
    """The arguments whose sizes or strides are other ones after a node ran."""
    places = tensor_nodes(node) if effects.reshapes else []
    return [places[place] for place in sorted(effects.reshapes)]
