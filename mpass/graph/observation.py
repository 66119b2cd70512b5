"""What one call of a graph does besides giving its value, found by running it once on fakes.

The call is run on fresh fake tensors of the sizes that its arguments have while compiling, and
every ATen op that it comes down to is looked at: its schema says which tensors it writes. So an
in-place activation, `out=`, a list of tensors and a custom op are all seen by what they do and not
by how they are called. What cannot be run, or is not torch's, is not known: it counts as writing to
all its tensors. Nothing here touches the example values of a graph or the guards on its shapes.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode

from mpass.graph.call_keys import (
    call_key,
    constant,
    layout,
    nodes_in,
    storages_in,
    tensor_nodes,
)
from mpass.graph.nodes import value_of

MAX_KNOWN = 8192
"""Calls that are remembered; a 32-layer model has about a hundred different ones."""


UNDECLARED_WRITES = frozenset({"native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"})
"""ATen ops that update running statistics in training, which their schemas do not say."""

FUNCTORCH = ("torch._functorch", "torch._C._functorch")
"""Modules whose functions open and close levels of vmap and grad, and wrap tensors for them.

They write to no tensor, and cannot be run or left out one by one.
"""


@dataclass(frozen=True)
class Effects:
    """What a call does, by the places of its tensors among its arguments (`tensor_nodes`).

    known: whether that was observed; if not, nothing may be assumed. writes: the places that are
    written. reshapes: those whose sizes, strides or memory are other ones afterwards. pure: whether
    nobody could notice if the call were left out but by its value and its writes.
    """

    known: bool
    writes: frozenset[int] = frozenset()
    reshapes: frozenset[int] = frozenset()
    pure: bool = False


UNKNOWN = Effects(known=False)
NOTHING = Effects(known=True, pure=True)
NOT_PURE = Effects(known=True, pure=False)


_shared: ContextVar[dict[fx.Node, tuple[Any, Any, Any, Effects]] | None] = ContextVar(
    "mpass_observations", default=None
)


@contextmanager
def shared_observations() -> Iterator[None]:
    """Observe each call of a graph once inside of the block, however many passes ask.

    A node is observed again if its target or arguments were replaced in between. Its arguments'
    sizes may not change: a rewrite puts in what has the sizes of what it replaces.
    """
    token = _shared.set({})
    try:
        yield
    finally:
        _shared.reset(token)


def observe(node: fx.Node) -> Effects:
    """The effects of a node of a graph."""
    shared = _shared.get()
    if shared is None:
        return observe_call(node)
    given = (node.target, node.args, node.kwargs)
    *before, effects = shared.get(node, (None, None, None, NOTHING))
    if any(old is not new for old, new in zip(before, given, strict=True)):
        effects = observe_call(node)
        shared[node] = (*given, effects)
    return effects


def observe_call(node: fx.Node) -> Effects:
    """The effects of a node, observed or from its schema or sub-graph."""
    if node.op in ("placeholder", "output"):
        return NOT_PURE
    if node.op == "get_attr":
        return NOTHING
    if node.op not in ("call_function", "call_method"):
        return UNKNOWN
    target: Any = node.target
    if isinstance(target, OpOverload):
        return effects_of_schema(node, target)
    if isinstance(target, HigherOrderOperator):
        return effects_of_subgraphs(node)
    if target is operator.getitem and isinstance(node.args[0], fx.Node):
        if not isinstance(value_of(node.args[0]), torch.Tensor):
            return NOTHING  # An item of a tuple or list.
    if (getattr(target, "__module__", None) or "").startswith(FUNCTORCH):
        return NOT_PURE
    key = call_key(node)
    if key is None:
        return UNKNOWN
    known = _observed.get(key)
    if known is None:
        if len(_observed) >= MAX_KNOWN:
            _observed.clear()
        known = _observed[key] = run_on_fakes(node)
    return known


_observed: dict[Any, Effects] = {}


# -- by schema and by sub-graph ---------------------------------------------------------------


def effects_of_schema(node: fx.Node, target: OpOverload) -> Effects:
    """What an operator's schema says."""
    written: set[fx.Node] = set()
    for index, argument in enumerate(target._schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[index] if index < len(node.args) else node.kwargs.get(argument.name)
        written.update(nodes_in(value))
    if undeclared(target):
        return UNKNOWN
    places = places_of(node, written)
    reshapes = places if torch.Tag.inplace_view in target.tags else frozenset()
    return Effects(True, places, reshapes, is_pure_op(target))


def undeclared(target: OpOverload) -> bool:
    return target.namespace == "aten" and target._schema.name[6:] in UNDECLARED_WRITES


def is_pure_op(target: OpOverload) -> bool:
    """Whether an ATen op draws no random numbers and has a result or something that it writes."""
    if torch.Tag.nondeterministic_seeded in target.tags:
        return False
    return bool(target._schema.returns) or target._schema.is_mutable


def effects_of_subgraphs(node: fx.Node) -> Effects:
    """A higher-order op does what its sub-graphs do; without readable ones it is not known."""
    owner = node.graph.owning_module
    names = [arg for arg in node.all_input_nodes if arg.op == "get_attr"]
    attributes = (getattr(owner, str(arg.target), None) for arg in names)
    graphs = [module.graph for module in attributes if isinstance(module, fx.GraphModule)]
    if not graphs:
        return UNKNOWN
    pure = True
    for graph in graphs:
        outside: set[int] = set()
        written: set[int] = set()
        for inner in graph.nodes:
            if inner.op in ("placeholder", "get_attr"):
                outside |= storages_in(value_of(inner))
            if inner.op not in ("call_function", "call_method"):
                continue
            effects = observe(inner)
            if not effects.known or effects.reshapes:
                return UNKNOWN
            pure = pure and effects.pure
            places = tensor_nodes(inner)
            for place in effects.writes:
                storages = storages_in(value_of(places[place]))
                if not storages:
                    return UNKNOWN
                written |= storages
        if written & outside:
            return Effects(True, frozenset(range(len(tensor_nodes(node)))), frozenset(), pure)
    return Effects(True, pure=pure)


def places_of(node: fx.Node, written: set[fx.Node]) -> frozenset[int]:
    return frozenset(i for i, arg in enumerate(tensor_nodes(node)) if arg in written)


# -- by running -------------------------------------------------------------------------------


@functools.cache
def fake_mode() -> FakeTensorMode:
    """A mode of our own: its sizes are numbers, and what depends on data stays inside of it."""
    env = ShapeEnv(allow_scalar_outputs=True, allow_dynamic_output_shape_ops=True)
    return FakeTensorMode(shape_env=env, allow_non_fake_inputs=True)


class Watch(TorchDispatchMode):
    """Notes which of some tensors' memory is written by the ops that run."""

    def __init__(self, tensors: list[tuple[int, torch.Tensor]]) -> None:
        super().__init__()
        self.places: dict[int, set[int]] = {}
        for place, tensor in tensors:
            for storage in storages_in(tensor):
                self.places.setdefault(storage, set()).add(place)
        self.written: set[int] = set()
        self.pure = True
        self.known = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):
            self.known = False
            return func(*args, **kwargs)
        self.pure = self.pure and is_pure_op(func)
        self.known = self.known and not undeclared(func)
        for index, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[index] if index < len(args) else kwargs.get(argument.name)
                for storage in storages_in(value):
                    self.written |= self.places.get(storage, set())
        return func(*args, **kwargs)


def run_on_fakes(node: fx.Node) -> Effects:
    """Run a call once on fresh fake tensors and say what it did to them."""
    tensors: list[tuple[int, torch.Tensor]] = []
    counter = iter(range(1 << 30))

    def fresh(argument: fx.Node) -> Any:
        place = next(counter)

        def make(value: Any) -> Any:
            if isinstance(value, torch.Tensor):
                tensor = fresh_tensor(value)
                tensors.append((place, tensor))
                return tensor
            if isinstance(value, (list, tuple)):
                return tuple(make(item) for item in value)
            return constant(value)

        return make(value_of(argument))

    try:
        with torch.no_grad(), fake_mode():
            args: Any = arguments(node.args, fresh)
            kwargs: Any = arguments(node.kwargs, fresh)
            if node.target in (operator.getitem, operator.setitem):
                args = (args[0], place_of(args[1]), *args[2:])
            before = [geometry(tensor) for _, tensor in tensors]
            with Watch(tensors) as watch:
                if node.op == "call_method":
                    result = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    result = node.target(*args, **kwargs)  # type: ignore[operator]
            changed = {
                place
                for (place, tensor), old in zip(tensors, before, strict=True)
                if geometry(tensor) != old
            }
    except Exception:  # whatever it is: what was not seen to the end is not known
        return UNKNOWN
    if not watch.known:
        return UNKNOWN
    pure = watch.pure and (bool(watch.written) or is_plain_result(result))
    return Effects(True, frozenset(watch.written | changed), frozenset(changed), pure)


def arguments(value: Any, fresh: Callable[[fx.Node], Any]) -> Any:
    """Arguments with fresh values in the places of nodes, visited in the order of `nodes_in`."""
    if isinstance(value, fx.Node):
        return fresh(value)
    if isinstance(value, tuple):
        return tuple(arguments(item, fresh) for item in value)
    if isinstance(value, list):
        return [arguments(item, fresh) for item in value]
    if isinstance(value, dict):
        return {name: arguments(item, fresh) for name, item in value.items()}
    if isinstance(value, slice):
        return slice(*(arguments(item, fresh) for item in (value.start, value.stop, value.step)))
    return constant(value)


def place_of(index: Any) -> Any:
    """An index with numbers for tensors of no dimension, whose value Python would ask for."""
    if isinstance(index, tuple):
        return tuple(place_of(item) for item in index)
    if isinstance(index, torch.Tensor) and index.dim() == 0 and index.dtype != torch.bool:
        return 0
    return index


def fresh_tensor(like: torch.Tensor) -> torch.Tensor:
    """A fake tensor of the sizes that another has now, which shares no memory with it."""
    shape, strides = layout(like)
    if len(strides) != len(shape):
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    return torch.empty_strided(shape, strides, dtype=like.dtype, device=like.device)


def geometry(tensor: torch.Tensor) -> tuple[Any, ...]:
    storage = int(tensor.untyped_storage()._cdata)
    return (tuple(tensor.shape), tensor.stride(), tensor.storage_offset(), tensor.dtype, storage)


def is_plain_result(value: object) -> bool:
    """Whether a result is tensors and numbers: no mode, handle or module."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain_result, value))
    kinds = (torch.Tensor, int, float, torch.SymInt, torch.SymFloat, torch.SymBool)
    return isinstance(value, kinds) or isinstance(value, (torch.dtype, torch.device))
