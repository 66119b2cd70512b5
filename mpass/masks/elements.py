"""Element expressions and the tensors they stand for: axes, sizes, views and constants."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.call_keys import hint
from mpass.graph.nodes import example, value_of
from mpass.graph.writes import storage_of
from mpass.masks.expressions import (
    Expr,
    NotUnderstood,
    as_number,
    as_truth,
    axis,
    number,
    substitute,
)

MAX_NODES = 1200
"""Most parts of an element expression; larger ones are not worth sympy's time."""


MAX_DEPTH = 40
"""Most levels of an element expression: sympy recurses over them."""


def as_stored(expr: Expr, dtype: torch.dtype) -> Expr:
    """A truth value in a tensor of numbers is 0 or 1, a number in a tensor of bools `!= 0`."""
    if dtype == torch.bool:
        return as_truth(expr)
    return as_number(expr)


def is_too_large(expr: Expr) -> bool:
    """Whether an expression has too many parts, or is nested too deeply, to be worked on."""
    pending = [(expr, 1)]
    count = 0
    while pending:
        part, depth = pending.pop()
        count += 1
        if count > MAX_NODES or depth > MAX_DEPTH:
            return True
        pending += [(arg, depth + 1) for arg in part.args]
    return False


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
    if a.dim() != b.dim() or a.dtype != b.dtype or overlaps(b):
        return False
    return geometry(a) == geometry(b)


def overlaps(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor might share memory, in the call that is being compiled."""
    steps = sorted(
        (hint(stride), hint(size))
        for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        if hint(size) > 1
    )
    reach = 0
    for stride, size in steps:
        if stride <= reach:
            return True
        reach += stride * (size - 1)
    return False


def geometry(tensor: torch.Tensor) -> list[Expr]:
    """Sizes, strides and offset of a tensor in its storage."""
    return [*map(number, (*tensor.shape, *tensor.stride(), tensor.storage_offset()))]


def dimension(value: Any, rank: int) -> int:
    """A dimension argument as a number from 0 on."""
    if not isinstance(value, int):
        raise NotUnderstood("dimension is not a constant")
    return value % rank if rank else 0
