"""Reading a graph backwards: what is the element of this tensor at its indices?

Reading stops at what it does not understand and names it by an uninterpreted function, so a wrong
answer would need a wrong rule (masks/rules), not a missing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.nodes import example, op_name, value_of
from mpass.graph.writes import StorageWrites, storage_of
from mpass.masks.expressions import Expr, NotUnderstood, axis, number, substitute

Rule = Callable[["OpCall"], Expr]


class GraphReader:
    """Element expressions of the tensors of one graph, each read once.

    rules: how ops are read, by name. bindings: tensors whose expression is given from outside (the
    indices of a mask_mod, the scores that a mask is added to).
    """

    def __init__(
        self,
        writes: StorageWrites,
        rules: Mapping[str, Rule],
        bindings: Mapping[fx.Node, Expr] | None = None,
        prefix: str = "",
    ) -> None:
        self.writes = writes
        self.rules = rules
        self.bindings = dict(bindings or {})
        self.prefix = prefix
        self.sources: dict[str, fx.Node] = {}
        self.failures: dict[str, str] = {}
        self._memo: dict[tuple[fx.Node, fx.Node | None], Expr] = {}

    def inner(self, writes: StorageWrites, bindings: Mapping[fx.Node, Expr]) -> GraphReader:
        """A reader of a sub-graph, whose unknowns are known here by names of their own."""
        reader = GraphReader(writes, self.rules, bindings, prefix=f"{self.prefix}inner.")
        reader.sources, reader.failures = self.sources, self.failures
        return reader

    def read(self, node: fx.Node, at: fx.Node) -> Expr:
        """The element of a node's tensor as another node sees it, in `axis(0)`, `axis(1)`, ..."""
        if node in self.bindings:
            return self.bindings[node]
        write = self.writes.last_write(node, self.writes.position[at])
        known = self._memo.get((node, write))
        if known is None:
            known = self._memo[node, write] = self._evaluate(node, write)
        return known

    def read_step(self, call: fx.Node, carried: fx.Node, value: Expr) -> Expr:
        """One op applied to a value that stands for one of its arguments; the rest is read."""
        shape = example(call).shape
        rule = self.rules[op_name(call)]
        return drop_unit_axes(rule(OpCall(self, call, shape, (carried, value))), shape)

    def known(self) -> Iterator[tuple[fx.Node, Expr]]:
        """The tensors read so far that nothing ever writes to, with their expressions."""
        for (node, write), expr in self._memo.items():
            if write is None and not self.writes.ever_written(node):
                yield node, expr

    def _evaluate(self, node: fx.Node, write: fx.Node | None) -> Expr:
        if write is None or write is node:
            return self._apply(node, node)
        if "out" in write.kwargs or not same_view(node, write.args[0] if write.args else None):
            return self.unknown(node, f"{node.name} is written through another view", write)
        return self._apply(write, node)

    def _apply(self, call: fx.Node, result: fx.Node) -> Expr:
        """The rule of a call on its arguments; `result` is the tensor that has its value."""
        shape = example(result).shape
        try:
            rule = self.rules.get(op_name(call))
            if rule is None:
                raise NotUnderstood("this op is not understood")
            return drop_unit_axes(rule(OpCall(self, call, shape)), shape)
        except (NotUnderstood, LookupError, TypeError, ValueError) as reason:
            return self.unknown(result, f"{op_name(call)}: {reason}", call)

    def unknown(self, node: fx.Node, reason: str = "", call: fx.Node | None = None) -> Expr:
        """An uninterpreted function of a tensor's own indices."""
        tensor = example(node)
        written = call is not None and call is not node
        name = self.prefix + node.name
        if written and call is not None:
            name += f"@{call.name}"
        self.sources[name] = node
        if reason and node.op not in ("placeholder", "get_attr"):
            self.failures[name] = reason
        integer = not (tensor.dtype.is_floating_point or tensor.dtype.is_complex)
        symbol = sympy.Function(name, integer=True) if integer else sympy.Function(name, real=True)
        indices = [axis(i) for i, size in enumerate(tensor.shape) if not is_one(size)]
        atom = symbol(*indices)
        if tensor.dtype == torch.bool:
            return sympy.Ne(atom, 0, evaluate=False)
        return atom


@dataclass(frozen=True)
class OpCall:
    """One op that is being read: its arguments by place or name, its result's shape."""

    reader: GraphReader
    node: fx.Node
    shape: torch.Size
    carried: tuple[fx.Node, Expr] | None = None

    def read(self, node: fx.Node) -> Expr:
        """Element expression of an argument in its own axes."""
        if self.carried is not None and node is self.carried[0]:
            return self.carried[1]
        return self.reader.read(node, self.node)

    def argument(self, place: int, name: str = "", default: Any = None) -> Any:
        """An argument with nodes that stand for numbers replaced by these numbers."""
        args, kwargs = self.node.args, self.node.kwargs
        value = args[place] if place < len(args) else kwargs.get(name, default)
        return unwrap_constant(value)

    def rest(self, start: int, name: str = "") -> tuple[Any, ...]:
        """Sizes given one by one or as one list, from a place on."""
        value = self.argument(start, name)
        if isinstance(value, (list, tuple)):
            return tuple(unwrap_constant(item) for item in value)
        return tuple(unwrap_constant(item) for item in self.node.args[start:])

    def tensor(self, place: int = 0, name: str = "input") -> tuple[Expr, torch.Size]:
        """Element expression and shape of a tensor argument."""
        value = self.argument(place, name)
        if not isinstance(value, fx.Node):
            raise NotUnderstood(f"argument {name} is no tensor")
        return self.read(value), example(value).shape

    def operand(self, place: int, name: str = "other") -> Expr:
        """A tensor argument or a number, broadcast to the result's dimensions."""
        return self.broadcast(self.argument(place, name))

    def broadcast(self, value: Any) -> Expr:
        """A tensor node or a number, broadcast to the result's dimensions."""
        if isinstance(value, fx.Node):
            expr = self.read(value)
            return align(expr, example(value).dim(), len(self.shape))
        return number(value)

    @property
    def dtype(self) -> torch.dtype:
        """dtype of the result."""
        value = value_of(self.node)
        return value.dtype if isinstance(value, torch.Tensor) else example(self.node.args[0]).dtype  # type: ignore[arg-type]


def unwrap_constant(value: Any) -> Any:
    """The int, float or SymInt that a node stands for; other values as they are."""
    if isinstance(value, fx.Node):
        meta = value_of(value)
        if isinstance(meta, (bool, int, float, torch.SymInt)):
            return meta
    return value


def align(expr: Expr, rank: int, result_rank: int) -> Expr:
    """Number the axes of a tensor as those of a tensor of higher rank that it broadcasts to."""
    shift = result_rank - rank
    if shift == 0:
        return expr
    return substitute(expr, {axis(i): axis(i + shift) for i in range(rank)})


def drop_unit_axes(expr: Expr, shape: torch.Size) -> Expr:
    """The index along a dimension of size 1 is 0."""
    zero = sympy.Integer(0)
    return substitute(expr, {axis(i): zero for i, size in enumerate(shape) if is_one(size)})


def is_one(size: int | torch.SymInt) -> bool:
    """Whether a size is the constant 1 (a symbol is never taken for it)."""
    return isinstance(size, int) and size == 1


def same_view(left: fx.Node, right: object) -> bool:
    """Whether two tensors are the same elements in the same places of one storage."""
    if not isinstance(right, fx.Node) or storage_of(left) != storage_of(right):
        return False
    a, b = example(left), example(right)
    if a.dim() != b.dim() or a.dtype != b.dtype:
        return False
    return geometry(a) == geometry(b)


def geometry(tensor: torch.Tensor) -> list[Expr]:
    """Sizes, strides and offset of a tensor in its storage."""
    return [*map(number, (*tensor.shape, *tensor.stride(), tensor.storage_offset()))]


def registrar(rules: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator `@rule("add", "sub")` that enters a function into `rules` under these names."""

    def rule(*names: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            rules.update(dict.fromkeys(names, function))
            return function

        return register

    return rule


def dimension(value: Any, rank: int) -> int:
    """A dimension argument as a number from 0 on."""
    if not isinstance(value, int):
        raise NotUnderstood("dimension is not a constant")
    return value % rank if rank else 0
