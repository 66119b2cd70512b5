"""How tensors are laid out in memory, and whether one may take the place of another."""

from __future__ import annotations

import contextlib
import itertools
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils import _pytree as pytree

from mpass.graph.arguments import subject
from mpass.graph.nodes import example, op_name, same_size, value_of
from mpass.graph.printing import without_guards

LAYOUTS = frozenset("transpose permute swapaxes contiguous reshape flatten".split())
"""Ops after which it may not matter any more how attention's output was laid out."""


def run_fake(node: fx.Node, values: dict[fx.Node, torch.Tensor]) -> object:
    """What a call gives on fake values: those given, else the ones that the nodes have."""

    def find(argument: fx.Node) -> Any:
        return values[argument] if argument in values else value_of(argument)

    args, kwargs = fx.map_arg(node.args, find), fx.map_arg(node.kwargs, find)
    # Ops that make tensors of their own (SDPA of a truth mask does) need the mode of the others.
    given = pytree.tree_leaves([args, kwargs])
    modes = (value.fake_mode for value in given if isinstance(value, FakeTensor))
    mode = next(modes, contextlib.nullcontext())
    with torch.no_grad(), without_guards(node), mode:
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]


def difference(old: torch.Tensor, new: torch.Tensor) -> str:
    """Why a value is no replacement of another, layout aside; "" if it is one."""
    pairs = zip(old.shape, new.shape, strict=False)
    if old.dim() != new.dim() or not all(same_size(*pair) for pair in pairs):
        return f"shape {tuple(old.shape)} would become {tuple(new.shape)}"
    for name in ("dtype", "device", "requires_grad"):
        if getattr(old, name) != getattr(new, name):
            return f"{name} {getattr(old, name)} would become {getattr(new, name)}"
    return ""


def same_layout(old: torch.Tensor, new: torch.Tensor) -> bool:
    """Whether two values of one shape have the same strides, where these matter."""
    rows = zip(old.shape, old.stride(), new.stride(), strict=True)
    return all(
        same_size(*strides) for size, *strides in rows if not (isinstance(size, int) and size < 2)
    )


def is_rearranged(output: fx.Node, new: torch.Tensor) -> bool:
    """Whether all that reads an output rearranges it, to the layout that it had anyway.

    Each step must be the only reader of the one before, so that no other can tell a view from a
    copy.
    """
    values = {output: new}
    node = output
    while len(node.users) == 1:
        (user,) = node.users
        if op_name(user) not in LAYOUTS or subject(user) is not node:
            return False
        result = run_fake(user, values)
        if not isinstance(result, torch.Tensor) or difference(example(user), result):
            return False
        if same_layout(example(user), result):
            return True
        values[user], node = result, user
    return False


def layout_order(value: torch.Tensor) -> tuple[int, ...] | None:
    """The order of dimensions in which a value lies densely in memory; None if it does not."""
    for order in itertools.permutations(range(value.dim())):
        expected: int | torch.SymInt = 1
        for dim in reversed(order):
            size = value.shape[dim]
            if isinstance(size, int) and size < 2:
                continue
            if not same_size(value.stride(dim), expected):
                break
            expected = expected * size
        else:
            return order
    return None
