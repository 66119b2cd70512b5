"""The part of a graph that computes a tensor, and running it on concrete values.

Sizes are those of the call that is being compiled, taken without a guard. A tensor is computed
whole, or for some rows of its next to last dimension where every op on the way works row by row:
that is how the masks of long prompts are looked at within bounded memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from mpass.graph.nodes import example, is_tensor, op_name, value_of
from mpass.graph.writes import StorageWrites, storage_of

MAX_NODES = 2000
"""A larger part of a graph is not run."""

SMALL = 2**16
"""Tensors of at most so many elements are computed whole whatever is asked."""

ALIASES = {
    "and": "bitwise_and",
    "or": "bitwise_or",
    "xor": "bitwise_xor",
    "invert": "bitwise_not",
    "inv": "bitwise_not",
    "truediv": "div",
    "floordiv": "floor_divide",
    "mod": "remainder",
}
"""Operators' names and those of the aten ops that they are."""

BY_ELEMENT = frozenset(
    "to type to_copy type_as float double half bfloat16 int long bool contiguous clone detach "
    "alias copy lift_fresh".split()
)
"""Ops by element that aten does not tag so."""

FACTORIES = {"ones": 1, "new_ones": 1, "ones_like": 1, "zeros": 0, "new_zeros": 0, "zeros_like": 0}


class NotRunError(Exception):
    """A part of a graph that cannot be run here, with the reason."""


def size_now(size: Any) -> int:
    """A size in the call that is being compiled; adds no guard."""
    if not isinstance(size, torch.SymInt):
        return int(size)
    known = size.node.shape_env.backed_var_to_val
    value = size.node.expr.xreplace(known)
    if not value.is_Integer:
        raise NotRunError(f"the size {size} is not known when compiling")
    return int(value)


def number_now(value: Any) -> Any:
    """A size, a number, or a tuple of them in the call that is being compiled."""
    if isinstance(value, (tuple, list)):
        return tuple(map(number_now, value))
    if isinstance(value, torch.SymInt):
        return size_now(value)
    if isinstance(value, (torch.SymFloat, torch.SymBool)):
        known = value.node.expr.xreplace(value.node.shape_env.backed_var_to_val)
        if isinstance(value, torch.SymBool):
            return bool(known)
        return float(known)
    return value


def shape_now(node: fx.Node) -> tuple[int, ...]:
    """Shape of a node's tensor in the call that is being compiled."""
    return tuple(map(size_now, example(node).shape))


def is_number(value: Any) -> bool:
    """Whether a node's value is a number or sizes, which need not be computed."""
    if isinstance(value, (tuple, list)):
        return all(map(is_number, value))
    symbolic = (torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, (bool, int, float, *symbolic))


@dataclass(frozen=True)
class Part:
    """The nodes that compute some tensors, in order; leaves are given, not computed."""

    nodes: tuple[fx.Node, ...]
    leaves: tuple[fx.Node, ...]
    writes: bool


def part_of(
    targets: list[fx.Node], given: Collection[fx.Node], at: fx.Node, writes: StorageWrites
) -> Part:
    """What has to run so that `at` can read the targets: their inputs, and writes to any of them.

    given: nodes whose values come from outside, whatever computes them.
    """
    before = writes.position[at]
    unused = ops_without_result(at.graph)
    found: dict[fx.Node, None] = {}
    leaves: dict[fx.Node, None] = {}
    written = False
    stack = list(targets)
    while stack:
        node = stack.pop()
        if node in found or node in leaves or node in given:
            continue
        if len(found) > MAX_NODES:
            raise NotRunError(f"more than {MAX_NODES} ops compute it")
        if node.op in ("placeholder", "get_attr"):
            leaves[node] = None
        elif value_of(node) is not None and is_number(value_of(node)):
            leaves[node] = None
            continue
        else:
            found[node] = None
            stack.extend(node.all_input_nodes)
        if is_tensor(node):
            candidates = {*writes.writes_to(node), *unused.get(storage_of(node), ())}
            writers = [w for w in candidates if writes.position.get(w, before) < before]
            written = written or bool(writers)
            stack.extend(writers)
    return Part(tuple(sorted(found, key=writes.position.__getitem__)), tuple(leaves), written)


def ops_without_result(graph: fx.Graph) -> dict[int | None, list[fx.Node]]:
    """Ops whose result nothing uses, by the memory of each argument.

    They are there for what they do to it, whatever is known of them: Dynamo drops what is dead.
    """
    found: dict[int | None, list[fx.Node]] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and not node.users:
            for argument in node.all_input_nodes:
                if is_tensor(argument):
                    found.setdefault(storage_of(argument), []).append(node)
    return found


def call(node: fx.Node, args: Any, kwargs: Any) -> Any:
    """The value of a node on concrete arguments."""
    target: Any = node.target
    if node.op == "call_method":
        return getattr(args[0], target)(*args[1:], **kwargs)
    if node.op == "call_function":
        return target(*args, **kwargs)
    raise NotRunError(f"{node.op} {target} is not run")


@dataclass
class Run:
    """One run of a part of a graph: values of nodes, whole or for some rows.

    queries: the size of the next to last dimension that rows are taken of. largest: tensors of more
    elements are not computed whole.
    """

    part: Part
    values: dict[fx.Node, Any]
    queries: int
    largest: int
    ordered: bool = False
    _strips: dict[fx.Node, Tensor] = field(default_factory=dict)
    rows: Tensor | None = None

    def start(self) -> None:
        """Run everything in order where something is written in place; else ops run when asked."""
        if not self.part.writes:
            return
        self.ordered = True
        total = sum(math.prod(shape_now(n)) for n in self.part.nodes if is_tensor(n))
        if total > self.largest:
            raise NotRunError("a mask of this size that is written in place is not run")
        for node in self.part.nodes:
            self.values[node] = self._call(node)

    def at_rows(self, rows: Tensor) -> None:
        """From now on strips are of these rows."""
        self.rows = rows
        self._strips.clear()

    def whole(self, node: fx.Node) -> Any:
        """The value of a node, all of it."""
        if node not in self.values:
            if is_tensor(node) and math.prod(shape_now(node)) > self.largest:
                raise NotRunError(f"{op_name(node)} makes a tensor that is too large to look at")
            self.values[node] = self._call(node)
        return self.values[node]

    def _call(self, node: fx.Node) -> Any:
        args = fx.map_arg(node.args, self.whole)
        kwargs = fx.map_arg(node.kwargs, self.whole)
        return call(node, args, kwargs)

    def strip(self, node: fx.Node) -> Tensor:
        """The value of a tensor [..., Nq, N] at the rows asked; of others all of it."""
        assert self.rows is not None
        if node not in self._strips:
            self._strips[node] = self._strip(node)
        return self._strips[node]

    def _strip(self, node: fx.Node) -> Tensor:
        rows = self.rows
        assert rows is not None
        shape = shape_now(node)
        by_row = len(shape) >= 2 and shape[-2] == self.queries and self.queries > 1
        if node in self.values or self.ordered or not by_row or math.prod(shape) <= SMALL:
            value: Tensor = self.whole(node)
            return value.index_select(-2, rows.to(value.device)) if by_row else value
        rule = STRIPS.get(op_name(node)) or (by_element if is_by_element(node) else None)
        if rule is None:
            return self.whole(node).index_select(-2, rows)
        return rule(self, node, (*shape[:-2], len(rows), shape[-1]))

    def plain(self, value: Any) -> Any:
        """An argument with nodes replaced by whole values."""
        return fx.map_arg(value, self.whole)


Shape = tuple[int, ...]
StripRule = Callable[[Run, fx.Node, Shape], Tensor]
STRIPS: dict[str, StripRule] = {}
"""How the ops of masks and scores compute some rows of their result."""


def strip_rule(*names: str) -> Callable[[StripRule], StripRule]:
    def register(function: StripRule) -> StripRule:
        STRIPS.update(dict.fromkeys(names, function))
        return function

    return register


def is_by_element(node: fx.Node) -> bool:
    """Whether an op computes each element of its result from those in the same place."""
    name = op_name(node)
    packet = getattr(torch.ops.aten, ALIASES.get(name, name), None)
    if name in BY_ELEMENT:
        return True
    if packet is None or not hasattr(packet, "overloads"):
        return False
    return any(torch.Tag.pointwise in getattr(packet, o).tags for o in packet.overloads())


def by_element(run: Run, node: fx.Node, _shape: Shape) -> Tensor:
    def restricted(arg: fx.Node) -> Any:
        return run.strip(arg) if is_tensor(arg) else run.whole(arg)

    args = fx.map_arg(node.args, restricted)
    kwargs = fx.map_arg(node.kwargs, restricted)
    result: Tensor = call(node, args, kwargs)
    return result


def tensor_argument(node: fx.Node) -> fx.Node:
    for arg in (*node.args, *node.kwargs.values()):
        if isinstance(arg, fx.Node) and is_tensor(arg):
            return arg
    raise NotRunError(f"{op_name(node)} has no tensor")


@strip_rule("expand", "expand_as", "broadcast_to")
def expand(run: Run, node: fx.Node, shape: Shape) -> Tensor:
    return run.strip(tensor_argument(node)).expand(shape)


@strip_rule("view", "reshape", "unsqueeze", "unflatten", "flatten", "squeeze", "unsafe_view")
def reshape(run: Run, node: fx.Node, shape: Shape) -> Tensor:
    operand = tensor_argument(node)
    if shape_now(operand)[-2:] != shape_now(node)[-2:]:
        return run.whole(node).index_select(-2, run.rows)
    return run.strip(operand).reshape(shape)


@strip_rule("getitem")
def getitem(run: Run, node: fx.Node, _shape: Shape) -> Tensor:
    operand, index = tensor_argument(node), node.args[1]
    items = list(index) if isinstance(index, (tuple, list)) else [index]
    rank = len(shape_now(operand))
    used = sum(item is not None and item is not Ellipsis for item in items)
    if Ellipsis not in items:
        items.append(Ellipsis)
    place = items.index(Ellipsis)
    items[place : place + 1] = [slice(None)] * (rank - used)
    kept = [item for item in items if item is not None]
    simple = all(item is None or isinstance(item, slice) for item in items)
    if not simple or None in items[-2:] or kept[-2] != slice(None):
        return run.whole(node).index_select(-2, run.rows)
    result: Tensor = run.strip(operand)[tuple(run.plain(items))]
    return result


@strip_rule("tril", "triu")
def triangle(run: Run, node: fx.Node, _shape: Shape) -> Tensor:
    operand = run.strip(tensor_argument(node))
    diagonal = node.args[1] if len(node.args) > 1 else node.kwargs.get("diagonal", 0)
    assert run.rows is not None
    keys = torch.arange(operand.shape[-1], device=operand.device)
    last = run.rows.to(operand.device)[:, None] + run.plain(diagonal)
    kept = keys <= last if "tril" in str(node.target) else keys >= last
    return operand.masked_fill(~kept, 0)


@strip_rule(*FACTORIES)
def constant(run: Run, node: fx.Node, shape: Shape) -> Tensor:
    fake = example(node)
    return torch.full(shape, FACTORIES[op_name(node)], dtype=fake.dtype, device=fake.device)


@strip_rule("full", "new_full", "full_like")
def full(run: Run, node: fx.Node, shape: Shape) -> Tensor:
    fake = example(node)
    place = 2 if op_name(node) == "new_full" else 1
    value = node.args[place] if len(node.args) > place else node.kwargs["fill_value"]
    return torch.full(shape, run.plain(value), dtype=fake.dtype, device=fake.device)


@strip_rule("matmul", "bmm")
def matmul(run: Run, node: fx.Node, _shape: Shape) -> Tensor:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    result: Tensor = call(node, (run.strip(left), run.plain(right)), {})
    return result


@strip_rule("cat")
def cat(run: Run, node: fx.Node, shape: Shape) -> Tensor:
    parts: Any = node.args[0] if node.args else node.kwargs["tensors"]
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    if dim not in (-1, len(shape) - 1):
        return run.whole(node).index_select(-2, run.rows)
    return torch.cat([run.strip(part) for part in parts], -1)


@strip_rule("amax")
def row_maximum(run: Run, node: fx.Node, shape: Shape) -> Tensor:
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    if dim not in (-1, [-1], (-1,)) or shape[-1] != 1:
        return run.whole(node).index_select(-2, run.rows)
    return run.strip(tensor_argument(node)).amax(-1, keepdim=True)


def real_tensor(node: fx.Node) -> Tensor | None:
    """The tensor that an input or attribute has in the call being compiled, if it is there."""
    if node.op == "placeholder":
        value = getattr(node.meta.get("grapharg"), "example", None)
    else:
        value = node.graph.owning_module
        for name in str(node.target).split("."):
            value = getattr(value, name, None)
    if isinstance(value, Tensor) and not isinstance(value, FakeTensor):
        return value.detach()
    return None
