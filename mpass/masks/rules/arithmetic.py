"""Rules for ops that compute: arithmetic, and sums and differences along a dimension.

A rule either is exact, in the dtype that the op computes in, or raises `NotUnderstood`.
"""

from __future__ import annotations

from collections.abc import Callable

import sympy
import torch
from torch._ops import OpOverload

from mpass.graph.nodes import is_tensor, op_name
from mpass.masks.elements import dimension
from mpass.masks.expressions import (
    Expr,
    NotUnderstood,
    Where,
    as_number,
    as_truth,
    axis,
    compare,
    is_truth,
    lift,
    number,
    select,
)
from mpass.masks.reader import OpCall, Rule, registrar
from mpass.masks.rules.values import EXACT_DTYPES, cast, cast_number

ARITHMETIC_RULES: dict[str, Rule] = {}

MAX_CONSTANT = 2**30
"""Larger integer constants could overflow an int32 index."""

rule = registrar(ARITHMETIC_RULES)


# -- arithmetic -------------------------------------------------------------------------------


def arithmetic(function: Callable[..., Expr], scaled: int | None = None) -> Rule:
    """A rule for arithmetic on two operands; `alpha` scales the one at `scaled`, if any."""

    def apply(call: OpCall) -> Expr:
        operands = [as_number(call.operand(0, "input")), as_number(call.operand(1))]
        if scaled is not None:
            # Positional in aten's overloads for numbers only; torch.add(x, 2, y) is an old form.
            place = 2 if isinstance(call.node.target, OpOverload) else None
            alpha = number(call.argument(place, "alpha", 1))
            if alpha != 1:
                operands[scaled] = lift(lambda value: times(value, alpha), operands[scaled])
        return exact(call, lift(function, *operands))

    return apply


def exact(call: OpCall, expr: Expr) -> Expr:
    """A computed value, where the dtype that it is computed in cannot round or wrap it."""
    if call.dtype == torch.bool:
        return as_truth(expr)
    return lift(lambda value: exact_number(value, call.dtype), expr)


def exact_number(value: Expr, dtype: torch.dtype) -> Expr:
    if value is sympy.nan:
        raise NotUnderstood("nan")
    if value.is_number:
        return cast_number(value, dtype)
    if dtype not in EXACT_DTYPES:
        raise NotUnderstood(f"arithmetic on positions in {dtype}")
    if not value.is_integer:
        raise NotUnderstood("arithmetic on what may be fractions, as biases are")
    if dtype != torch.int64 and any(abs(term) > MAX_CONSTANT for term in constants(value)):
        raise NotUnderstood(f"{dtype} might wrap or round")
    return value


def constants(value: Expr) -> list[Expr]:
    return [atom for atom in value.atoms(sympy.Number) if atom.is_finite]


def times(left: Expr, right: Expr) -> Expr:
    return sympy.expand(left * right)


ARITHMETIC_RULES |= {
    "add": arithmetic(lambda left, right: left + right, 1),
    **dict.fromkeys(("sub", "subtract"), arithmetic(lambda left, right: left - right, 1)),
    "rsub": arithmetic(lambda left, right: right - left, 0),
    **dict.fromkeys(("mul", "multiply"), arithmetic(times)),
}


@rule("neg", "negative")
def neg(call: OpCall) -> Expr:
    return exact(call, lift(lambda value: -value, as_number(call.operand(0, "input"))))


@rule("floordiv", "floor_divide")
def floor_divide(call: OpCall) -> Expr:
    return quotient(call)


@rule("div", "divide", "truediv", "true_divide")
def divide(call: OpCall) -> Expr:
    """Division with rounding_mode="floor"; true division of constants only."""
    rounding = call.argument(None, "rounding_mode")
    if rounding == "floor":
        return quotient(call)
    if rounding is not None:
        raise NotUnderstood(f"division with rounding_mode={rounding!r}")

    def apply(left: Expr, right: Expr) -> Expr:
        if left.is_infinite and right.is_positive:
            return left
        if not (left.is_number and right.is_number) or right == 0:
            raise NotUnderstood("true division")
        return left / right

    return exact(call, lift(apply, as_number(call.operand(0, "input")), as_number(call.operand(1))))


def quotient(call: OpCall) -> Expr:
    def apply(left: Expr, right: Expr) -> Expr:
        if not (left.is_integer and right.is_integer and right.is_positive):
            raise NotUnderstood("floor division by what is not a positive integer")
        return sympy.floor(left / right)

    return exact(call, lift(apply, as_number(call.operand(0, "input")), as_number(call.operand(1))))


@rule("remainder", "mod")
def remainder(call: OpCall) -> Expr:
    def apply(left: Expr, right: Expr) -> Expr:
        if not (left.is_integer and right.is_integer and right.is_positive):
            raise NotUnderstood("remainder by what is not a positive integer")
        return sympy.Mod(left, right)

    return exact(call, lift(apply, as_number(call.operand(0, "input")), as_number(call.operand(1))))


@rule("abs", "absolute")
def absolute(call: OpCall) -> Expr:
    zero = number(0)

    def apply(value: Expr) -> Expr:
        return Where(compare(sympy.Lt, value, zero), -value, value)

    return exact(call, lift(apply, as_number(call.operand(0, "input"))))


@rule("minimum", "maximum", "min", "max")
def extremum(call: OpCall) -> Expr:
    """The smaller or the larger of two tensors; min and max of one tensor are others."""
    if op_name(call.node) in ("min", "max") and not is_tensor(call.raw(1, "other")):
        raise NotUnderstood("the extremum of a tensor")
    pick = smaller if op_name(call.node) in ("minimum", "min") else larger
    return exact(call, lift(pick, as_number(call.operand(0, "input")), as_number(call.operand(1))))


def smaller(left: Expr, right: Expr) -> Expr:
    return Where(compare(sympy.Le, left, right), left, right)


def larger(left: Expr, right: Expr) -> Expr:
    return Where(compare(sympy.Ge, left, right), left, right)


@rule("clamp", "clip", "clamp_min", "clamp_max")
def clamp(call: OpCall) -> Expr:
    """Not less than `min`, then not more than `max`; numbers, which the op casts, or tensors."""
    name = op_name(call.node)
    names = {"clamp_min": ("min",), "clamp_max": ("max",)}.get(name, ("min", "max"))
    expr = as_number(call.operand(0, "input"))
    for place, bound in enumerate(names, start=1):
        value = call.raw(place, bound)
        if value is None:
            continue
        limit = cast(as_number(call.operand(place, bound)), call.dtype)
        expr = lift(larger if bound == "min" else smaller, expr, limit)
    return exact(call, expr)


# -- along a dimension ------------------------------------------------------------------------


@rule("tril", "triu")
def triangle(call: OpCall) -> Expr:
    """Zero above (tril) or below (triu) a diagonal of the last two dimensions."""
    expr, shape = call.tensor()
    row, column = axis(len(shape) - 2), axis(len(shape) - 1)
    diagonal = number(call.argument(1, "diagonal", 0))
    lower = op_name(call.node) == "tril"
    kept = compare(sympy.Le if lower else sympy.Ge, column, row + diagonal)
    # Substituting 0 for a unit dimension is right here too: the reader does it to the result.
    return select(kept, expr, sympy.false if is_truth(expr) else number(0))


@rule("cumsum")
def cumsum(call: OpCall) -> Expr:
    """Of a value that does not change along the dimension: value * (index + 1)."""
    expr, shape = call.tensor()
    along = axis(dimension(call.argument(1, "dim"), len(shape)))
    dtype = call.argument(None, "dtype")
    expr = as_number(expr) if dtype is None else cast(expr, dtype)
    if isinstance(expr, Where) or along in expr.free_symbols or not expr.is_integer:
        raise NotUnderstood("cumulative sum of what changes along the dimension")
    return exact(call, times(expr, along + 1))


@rule("diff")
def diff(call: OpCall) -> Expr:
    """First difference along a dimension, with at most one value prepended."""
    expr, shape = call.tensor()
    dim = dimension(call.argument(2, "dim", -1), len(shape))
    prepend = call.raw(3, "prepend")
    if call.argument(1, "n", 1) != 1 or call.argument(4, "append") is not None:
        raise NotUnderstood("higher differences")
    if shape[dim] == 1 or is_truth(expr):
        raise NotUnderstood("difference of what may have one element")
    along = axis(dim)
    if prepend is None:
        return exact(call, lift(lambda value: step(value, along, along + 1), expr))
    first, first_shape = call.tensor(3, "prepend")
    if first_shape[dim] != 1:
        raise NotUnderstood("several values prepended")

    def apply(value: Expr, before: Expr) -> Expr:
        rest = step(value, along, along, along - 1)
        start = sympy.expand(value.xreplace({along: number(0)}) - before)
        return rest if rest == start else Where(compare(sympy.Lt, along, number(1)), start, rest)

    return exact(call, lift(apply, expr, first))


def step(value: Expr, along: Expr, late: Expr, early: Expr | None = None) -> Expr:
    """value at `late` minus value at `early`, which is the dimension's own index by default."""
    before = value if early is None else value.xreplace({along: early})
    return sympy.expand(value.xreplace({along: late}) - before)
