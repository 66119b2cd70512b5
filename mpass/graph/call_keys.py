"""Keys under which calls are known: the target, and all that is constant about its arguments.

`call_key` is for effects, which few things decide; `exact_key` for whatever a value while compiling
may decide.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverloadPacket
from torch._subclasses.fake_tensor import FakeTensor

from mpass.graph.nodes import is_torch_function, value_of

UNBACKED_SIZE = 8
"""Stands for a size that depends on data."""


def tensor_nodes(node: fx.Node) -> list[fx.Node]:
    """The nodes among a call's arguments, in order and once per place."""
    return [*nodes_in(node.args), *nodes_in(node.kwargs)]


def nodes_in(value: object) -> Iterator[fx.Node]:
    """The nodes of an argument, which may be nested."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from nodes_in(item)
    elif isinstance(value, slice):
        yield from nodes_in((value.start, value.stop, value.step))


def storages_in(value: object) -> set[int]:
    """Identities of the memory of a value's tensors; empty if it has none or that is not known."""
    found: set[int] = set()
    for tensor in tensors_in(value):
        try:
            found.add(int(unwrapped(tensor).untyped_storage()._cdata))
        except (NotImplementedError, RuntimeError):  # a subclass without memory of its own
            return set()
    return found


def unwrapped(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor that has the memory of one at a level of torch.func: batched, tracking, ..."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def tensors_in(value: object) -> Iterator[torch.Tensor]:
    """The tensors of a value, which may be a nested list."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)


class Unobservable(Exception):
    """A call, or one of its arguments, that cannot be run on fakes."""


def call_key(node: fx.Node) -> Any:
    """What the effects of a call depend on; None if it must not be run.

    Numbers other than 0 and 1 (which may stand for True) tell nothing about what is written.
    """
    target: Any = node.target
    if node.op == "call_method":
        if not hasattr(torch.Tensor, str(target)):
            return None
    elif isinstance(target, OpOverloadPacket):
        pass
    elif not is_torch_function(target):
        return None
    try:
        args, kwargs = frozen(node.args), frozen(node.kwargs)
        key = (node.op, target, args, kwargs)
        hash(key)
    except (Unobservable, TypeError):
        return None
    result = value_of(node)
    if isinstance(result, torch.Tensor):
        return key
    if any(True for arg in tensor_nodes(node) for _ in tensors_in(value_of(arg))):
        return key
    # Arithmetic of sizes; what works on no tensor (a mode, functorch's levels) is never run.
    numbers = isinstance(result, (int, float, torch.SymInt, torch.SymFloat, torch.SymBool))
    own = getattr(target, "__module__", None) in ("_operator", "math", "builtins", "torch")
    return key if numbers and own else None


def frozen(value: object) -> Any:
    """An argument as part of a key. Raises Unobservable for what is neither tensor nor constant."""
    if isinstance(value, fx.Node):
        return frozen_value(value_of(value))
    if isinstance(value, (list, tuple)):
        return tuple(frozen(item) for item in value)
    if isinstance(value, dict):
        return tuple((name, frozen(item)) for name, item in value.items())
    if isinstance(value, slice):
        return ("slice", frozen(value.start), frozen(value.stop), frozen(value.step))
    return frozen_value(value)


def frozen_value(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        shape, strides = layout(value)
        return ("tensor", value.dtype, value.device.type, tuple(shape), tuple(strides))
    if isinstance(value, (torch.SymInt, torch.SymBool, torch.SymFloat)):
        value = constant(value)
    if isinstance(value, bool) or value is None or value is Ellipsis:
        return (type(value), value)
    if isinstance(value, int):
        return (int, value if value in (0, 1, -1) else 2 if value > 0 else -2)
    if isinstance(value, (float, complex, str, torch.dtype, torch.device, torch.layout)):
        return (type(value), value)
    if isinstance(value, torch.memory_format):
        return (torch.memory_format, value)
    if isinstance(value, (list, tuple)):
        return tuple(frozen_value(item) for item in value)
    raise Unobservable(type(value).__name__)


def layout(tensor: torch.Tensor) -> tuple[list[int], list[int]]:
    """Sizes and strides in the call that is being compiled; strides are empty for row-major order.

    A tensor inside of vmap has the sizes that the function sees. Raises Unobservable for a subclass
    or a sparse tensor, which have no strided memory of their own.
    """
    if type(unwrapped(tensor)) not in (FakeTensor, torch.Tensor, torch.nn.Parameter):
        raise Unobservable("a tensor subclass")
    if tensor.layout != torch.strided:
        raise Unobservable("no strided tensor")
    shape = hints(tensor.shape)
    if torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        return shape, []
    strides = hints(tensor.stride())
    if 0 not in strides:
        return shape, strides
    repeated = any(stride == 0 and size > 1 for size, stride in zip(shape, strides, strict=True))
    return shape, [] if repeated else strides


def hints(sizes: Sequence[int | torch.SymInt]) -> list[int]:
    """Sizes in the call that is being compiled."""
    return [size if type(size) is int else hint(size) for size in sizes]


def exact_key(value: Any, stands_for: Mapping[fx.Node, str] | None = None) -> Any:
    """An argument as part of a key that tells all of its value while compiling, without numbers.

    stands_for: nodes that are known by a name instead. Raises Unobservable for a value that is not
    known, and for a tensor whose memory is not that of a plain fake one.
    """
    if isinstance(value, fx.Node):
        if stands_for is not None:
            if value in stands_for:
                return stands_for[value]
            if isinstance(value_of(value), torch.Tensor):
                raise Unobservable("a tensor that is not named")
        known = value_of(value)
        if known is None:
            raise Unobservable("a node without a value")
        return exact_key(known)
    if isinstance(value, (list, tuple)):
        return (type(value), *(exact_key(item, stands_for) for item in value))
    if isinstance(value, dict):
        return tuple((name, exact_key(item, stands_for)) for name, item in value.items())
    if isinstance(value, slice):
        return ("slice", exact_key((value.start, value.stop, value.step), stands_for))
    if isinstance(value, torch.Tensor):
        return exact_tensor(value)
    if isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return (type(value), value.node.expr, id(value.node.shape_env))
    if value is None or value is Ellipsis or isinstance(value, CONSTANTS):
        return (type(value), value)
    raise Unobservable(type(value).__name__)


CONSTANTS = (
    *(bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
"""Types of arguments that are what they are."""


def exact_tensor(tensor: torch.Tensor) -> Any:
    """All that a plain fake tensor is, but for where its memory lies."""
    if type(tensor) is not FakeTensor or tensor.layout != torch.strided:
        raise Unobservable("no plain fake tensor")
    return (
        *(tensor.dtype, tensor.device, tensor.requires_grad),
        exact_key(tuple(tensor.shape)),
        exact_key(tensor.stride()),
        exact_key(tensor.storage_offset()),
        id(tensor.fake_mode),
    )


def hint(size: Any) -> int:
    """A size in the call that is being compiled."""
    return int(constant(size))


def constant(value: Any) -> Any:
    """A symbolic number as the one that it stands for now; asks without adding a guard."""
    if not isinstance(value, (torch.SymInt, torch.SymFloat, torch.SymBool)):
        return value
    node = value.node
    if node.has_hint():
        return node.hint
    return {torch.SymInt: UNBACKED_SIZE, torch.SymFloat: 0.5, torch.SymBool: True}[type(value)]
