"""Reading a graph backwards: what is the element of this tensor at its indices?

Reading stops at what it does not understand and names it by an uninterpreted function, so a wrong
answer would need a wrong rule (masks/rules), not a missing one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.nodes import example, op_name, value_of
from mpass.graph.writes import StorageWrites
from mpass.masks.elements import (
    align,
    as_stored,
    drop_unit_axes,
    is_one,
    is_too_large,
    same_view,
    unwrap_constant,
)
from mpass.masks.expressions import (
    Expr,
    NotUnderstood,
    axis,
    number,
)

Rule = Callable[["OpCall"], Expr]

MAX_STEPS = 400
"""A mask that takes more ops than this to read is given up."""


ALIASES: Mapping[str, tuple[str, ...]] = {
    "input": ("self", "x", "a", "x1"),
    "other": ("x2",),
    "dim": ("axis",),
}
"""Other names that torch takes for a parameter."""

NO_OPS = frozenset({"device", "pin_memory", "layout", "memory_format", "non_blocking", "names"})
"""Keywords that do not change the values of a result."""


class Needed(Exception):
    """Raised while a rule runs: this tensor has to be read first."""

    def __init__(self, node: fx.Node, write: fx.Node | None) -> None:
        super().__init__(node.name)
        self.node, self.write = node, write


class GraphReader:
    """Element expressions of the tensors of one graph, each read once.

    rules: how ops are read, by name. bindings: tensors whose expression is given from outside (the
    indices of a mask_mod, the scores that a mask is added to).

    Reading does not recurse: a rule that asks for a tensor that was not read yet is left, and run
    again when it was.
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
        try:
            return self.known_element(node, at)
        except Needed as needed:
            return self._read_all(needed)

    def known_element(self, node: fx.Node, at: fx.Node) -> Expr:
        """The same, if it was read already. Raises Needed if not."""
        if node in self.bindings:
            return self.bindings[node]
        if not isinstance(value_of(node), torch.Tensor):
            raise NotUnderstood(f"{node.name} is no tensor")
        write = self.writes.last_write(node, self.writes.position[at])
        known = self._memo.get((node, write))
        if known is None:
            raise Needed(node, write)
        return known

    def _read_all(self, needed: Needed) -> Expr:
        """Read a tensor and what it is made of, innermost first."""
        stack = [(needed.node, needed.write)]
        steps = 0
        while stack:
            node, write = stack[-1]
            if (node, write) in self._memo:
                stack.pop()
                continue
            try:
                self._memo[node, write] = self._evaluate(node, write)
            except Needed as inner:
                stack.append((inner.node, inner.write))
                steps += 1
                if steps > MAX_STEPS:
                    self._give_up(stack)
        return self._memo[needed.node, needed.write]

    def _give_up(self, stack: list[tuple[fx.Node, fx.Node | None]]) -> None:
        reason = f"this mask takes more than {MAX_STEPS} steps to read"
        for node, write in stack:
            self._memo[node, write] = self.unknown(node, reason, write or node)

    def read_step(self, call: fx.Node, carried: fx.Node, value: Expr) -> Expr:
        """One op applied to a value that stands for one of its arguments; the rest is read."""
        while True:
            try:
                expr = self._run_rule(call, call, (carried, value))
            except Needed as needed:
                self._read_all(needed)
                continue
            except RecursionError:
                raise NotUnderstood("the mask is made of too many parts") from None
            if is_too_large(expr):
                raise NotUnderstood("the mask is made of too many parts")
            return expr

    def known(self) -> Iterator[tuple[fx.Node, Expr]]:
        """The tensors read so far that nothing ever writes to, with their expressions."""
        for (node, write), expr in self._memo.items():
            if write is None and not self.writes.ever_written(node):
                yield node, expr

    def _evaluate(self, node: fx.Node, write: fx.Node | None) -> Expr:
        reshaping = self.writes.reshaped(node)
        if reshaping is not None:
            return self.unknown(node, f"{node.name} is reshaped in place", reshaping)
        if write is None or write is node:
            return self._apply(node, node)
        target = first_argument(write)
        # Only `x.op_(...)` whose one written tensor is x itself, seen through this very view.
        if (
            "out" in write.kwargs
            or self.writes.written_by(write) != [target]
            or not same_view(node, target)
        ):
            return self.unknown(node, f"{node.name} is written through another view", write)
        return self._apply(write, node)

    def _apply(self, call: fx.Node, result: fx.Node) -> Expr:
        """The rule of a call on its arguments; `result` is the tensor that has its value."""
        try:
            expr = self._run_rule(call, result)
            if is_too_large(expr):
                raise NotUnderstood("the mask is made of too many parts")
            return expr
        except RecursionError:
            return self.unknown(result, "the mask is made of too many parts", call)
        except (NotUnderstood, LookupError, TypeError, ValueError, AttributeError) as reason:
            return self.unknown(result, f"{op_name(call)}: {reason}", call)

    def _run_rule(
        self, call: fx.Node, result: fx.Node, carried: tuple[fx.Node, Expr] | None = None
    ) -> Expr:
        rule = self.rules.get(op_name(call))
        if rule is None:
            raise NotUnderstood("this op is not understood")
        tensor = example(result)
        bound = OpCall(self, call, tensor.shape, tensor.dtype, carried)
        expr = rule(bound)
        bound.check_all_used()
        return drop_unit_axes(as_stored(expr, tensor.dtype), tensor.shape)

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
    """One op that is being read: its arguments, its result's shape and dtype.

    A rule takes every argument that was given, by place or name; what it leaves and is not known
    to be without effect makes the call not understood (`check_all_used`).
    """

    reader: GraphReader
    node: fx.Node
    shape: torch.Size
    dtype: torch.dtype
    carried: tuple[fx.Node, Expr] | None = None
    used: set[int | str] = field(default_factory=set)

    def read(self, node: fx.Node) -> Expr:
        """Element expression of an argument in its own axes. Raises Needed if it is to be read."""
        if self.carried is not None and node is self.carried[0]:
            return self.carried[1]
        return self.reader.known_element(node, self.node)

    def raw(self, place: int | None, name: str = "", default: Any = None) -> Any:
        """An argument by place (None: keyword only) or by name, as it stands in the graph."""
        args, kwargs = self.node.args, self.node.kwargs
        if place is not None and place < len(args):
            self.used.add(place)
            return args[place]
        for alias in (name, *ALIASES.get(name, ())):
            if alias in kwargs:
                self.used.add(alias)
                return kwargs[alias]
        return default

    def argument(self, place: int | None, name: str = "", default: Any = None) -> Any:
        """An argument with nodes that stand for numbers replaced by these numbers."""
        return unwrap_constant(self.raw(place, name, default))

    def rest(self, start: int, name: str = "") -> tuple[Any, ...]:
        """Sizes given one by one or as one list, from a place on."""
        value = self.argument(start, name)
        if isinstance(value, (list, tuple)):
            return tuple(unwrap_constant(item) for item in value)
        self.used.update(range(start, len(self.node.args)))
        return tuple(unwrap_constant(item) for item in self.node.args[start:])

    def skip(self, start: int = 1) -> None:
        """Take all arguments from a place on: they only decide the result's shape or dtype."""
        self.used.update(range(start, len(self.node.args)))
        self.used.update(self.node.kwargs)

    def skip_sizes(self, start: int = 1) -> None:
        """Take all arguments from a place on as sizes and dimensions, which the result shows."""
        given = [*self.node.args[start:], *self.node.kwargs.values()]
        if any(isinstance(value, (torch.dtype, str)) for value in given):
            raise NotUnderstood("reinterpreting bits")
        self.skip(start)

    def check_all_used(self) -> None:
        """Raise NotUnderstood for an argument that the rule did not take."""
        if "out" in self.node.kwargs:
            raise NotUnderstood("written to out=")
        if self.node.op not in ("call_function", "call_method") or self.node.target is getattr:
            return
        for place, value in enumerate(self.node.args):
            if place not in self.used and value is not None:
                raise NotUnderstood(f"argument {place + 1} is not understood")
        for name, value in self.node.kwargs.items():
            without_effect = name in NO_OPS or value is None or value is False
            if name not in self.used and not (without_effect and not isinstance(value, fx.Node)):
                raise NotUnderstood(f"argument {name} is not understood")

    def tensor(self, place: int = 0, name: str = "input") -> tuple[Expr, torch.Size]:
        """Element expression and shape of a tensor argument."""
        value = self.argument(place, name)
        if not isinstance(value, fx.Node):
            raise NotUnderstood(f"argument {name} is no tensor")
        return self.read(value), self.shape_of(value)

    def shape_of(self, node: fx.Node) -> torch.Size:
        """Shape of an argument, which must have been the same when this op ran."""
        if self.reader.writes.reshaped(node) is not None:
            raise NotUnderstood(f"{node.name} is reshaped in place")
        return example(node).shape

    def operand(self, place: int, name: str = "other") -> Expr:
        """A tensor argument or a number, broadcast to the result's dimensions."""
        value = self.argument(place, name, MISSING)
        if value is MISSING:
            raise NotUnderstood(f"argument {name} is missing")
        return self.broadcast(value)

    def broadcast(self, value: Any) -> Expr:
        """A tensor node or a number, broadcast to the result's dimensions."""
        if isinstance(value, fx.Node):
            expr = self.read(value)
            return align(expr, len(self.shape_of(value)), len(self.shape))
        return number(value)


MISSING = object()


def first_argument(node: fx.Node) -> fx.Node | None:
    """The tensor that an in-place op is called on."""
    names = ("input", *ALIASES["input"])
    given = (node.kwargs[name] for name in names if name in node.kwargs)
    first = node.args[0] if node.args else next(given, None)
    return first if isinstance(first, fx.Node) else None


def registrar(rules: dict[str, Rule]) -> Callable[..., Callable[[Rule], Rule]]:
    """A decorator `@rule("add", "sub")` that enters a function into `rules` under these names."""

    def rule(*names: str) -> Callable[[Rule], Rule]:
        def register(function: Rule) -> Rule:
            rules.update(dict.fromkeys(names, function))
            return function

        return register

    return rule
