"""Rules for ops that make or combine values: element of the result from elements of the operands.

A rule either is exact or raises `NotUnderstood`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch

from mpass.mask_expr import (
    Expr,
    NotUnderstood,
    Where,
    as_number,
    as_truth,
    axis,
    compare,
    is_truth,
    lift,
    negate,
    number,
    select,
)
from mpass.mask_reader import Call, Rule

VALUE_RULES: dict[str, Rule] = {}

EXACT_DTYPES = (torch.int64, torch.int32, torch.float64, torch.float32)
"""dtypes that hold every position of a sequence exactly (float32 below 2**24)."""

MAX_CONSTANT = 2**30
"""Larger integer constants could overflow an int32 index."""

LARGE = 4096.0
"""Numbers of at least this magnitude stand for infinity in a mask, so rounding is no matter."""


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a function as the rule of ops of these names."""

    def register(function: Rule) -> Rule:
        VALUE_RULES.update(dict.fromkeys(names, function))
        return function

    return register


def dimension(value: Any, rank: int) -> int:
    """A dimension argument as a number from 0 on."""
    if not isinstance(value, int):
        raise NotUnderstood("dimension is not a constant")
    return value % rank if rank else 0


# -- constants --------------------------------------------------------------------------------


@rule("placeholder")
def placeholder(call: Call) -> Expr:
    return call.reader.unknown(call.node)


@rule("get_attr")
def get_attr(call: Call) -> Expr:
    """A constant of one element that tracing lifted out of the program; else an input."""
    name = str(call.node.target)
    owner = call.node.graph.owning_module
    value = getattr(owner, name, None) if owner is not None and "." not in name else None
    lifted = "tensor_constant" in name or "lifted_tensor" in name
    if lifted and isinstance(value, torch.Tensor) and value.numel() == 1:
        return number(value.item())
    return call.reader.unknown(call.node)


@rule("arange")
def arange(call: Call) -> Expr:
    start, end, step = number(0), call.argument(0, "end"), number(1)
    second = call.argument(1)
    if second is not None and not isinstance(second, torch.dtype):
        start, end = number(call.argument(0)), second
        step = number(call.argument(2, "step", 1))
    elif "start" in call.node.kwargs:
        start = number(call.argument(99, "start"))
        end, step = call.argument(99, "end", end), number(call.argument(99, "step", 1))
    number(end)
    if not (start.is_integer and step.is_integer) or call.dtype not in EXACT_DTYPES:
        raise NotUnderstood("arange of fractions, or in a dtype that does not hold every position")
    return start + step * axis(0)


@rule("ones", "new_ones", "ones_like")
def ones(call: Call) -> Expr:
    return sympy.true if call.dtype == torch.bool else number(1)


@rule("zeros", "new_zeros", "zeros_like", "zero")
def zeros(call: Call) -> Expr:
    return sympy.false if call.dtype == torch.bool else number(0)


@rule("full", "new_full", "full_like")
def full(call: Call) -> Expr:
    return stored(call, call.argument(1, "fill_value"))


@rule("fill")
def fill(call: Call) -> Expr:
    return stored(call, call.argument(1, "value"))


@rule("tensor", "scalar_tensor", "as_tensor")
def tensor(call: Call) -> Expr:
    value = call.argument(0, "data", call.argument(0, "s"))
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = value[0]
    if isinstance(value, (list, tuple)):
        raise NotUnderstood("a tensor of several constants")
    return stored(call, value)


def stored(call: Call, value: Any) -> Expr:
    """A number as the result's dtype holds it."""
    return cast(call.broadcast(value), call.dtype)


# -- dtype ------------------------------------------------------------------------------------


@rule("to", "type", "to_copy", "type_as", "float", "double", "half", "bfloat16", "int", "long")
@rule("bool", "convert_element_type", "copy", "lift_fresh_copy", "lift_fresh")
@rule("contiguous", "clone", "detach", "alias", "cpu", "cuda")
def convert(call: Call) -> Expr:
    """dtype and device conversions, and copies: the value as the result's dtype holds it."""
    if call.node.target in ("copy_", torch.ops.aten.copy_.default, torch.ops.aten.copy.default):
        return cast(call.operand(1, "src"), call.dtype)
    expr, _ = call.tensor()
    return cast(expr, call.dtype)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """The value of an expression in another dtype."""
    if dtype == torch.bool:
        return as_truth(expr)
    return lift(lambda value: cast_number(value, dtype), as_number(expr))


def cast_number(value: Expr, dtype: torch.dtype) -> Expr:
    """A number in another dtype, if that holds it exactly; very large magnitudes may be rounded."""
    if value.is_number:
        if value in (0, 1) or fits(float(value), dtype):
            return value
        raise NotUnderstood(f"{dtype} does not hold {value}")
    if dtype not in EXACT_DTYPES:
        raise NotUnderstood(f"{dtype} does not hold every value of {value}")
    if not dtype.is_floating_point and not value.is_integer:
        raise NotUnderstood(f"fractions cut off by {dtype}")
    return value


def fits(value: float, dtype: torch.dtype) -> bool:
    """Whether a dtype holds a number exactly, or as a magnitude that only hides a key."""
    if not dtype.is_floating_point:
        if dtype == torch.bool or not value.is_integer():
            return False
        return torch.iinfo(dtype).min <= value <= torch.iinfo(dtype).max
    if math.isinf(value) or abs(value) >= LARGE:
        return True
    digits = 1 - math.log2(torch.finfo(dtype).eps)
    return (math.frexp(value)[0] * 2.0**digits).is_integer() and abs(value) >= 2.0**-14


# -- logic and comparison ---------------------------------------------------------------------


def logical(function: Callable[..., Expr]) -> Rule:
    """A rule for a logical op on two operands; bitwise ops on integers are not understood."""

    def apply(call: Call) -> Expr:
        return function(as_truth(call.operand(0, "input")), as_truth(call.operand(1)))

    return apply


def bitwise(function: Callable[..., Expr]) -> Rule:
    """The same for a bitwise op, which is logical on truth values only."""

    def apply(call: Call) -> Expr:
        left, right = call.operand(0, "input"), call.operand(1)
        if not (is_truth(left) and is_truth(right)):
            raise NotUnderstood("bitwise op on integers")
        return function(left, right)

    return apply


def exclusive(left: Expr, right: Expr) -> Expr:
    return select(left, negate(right), right)


VALUE_RULES |= {
    "logical_and": logical(sympy.And),
    "logical_or": logical(sympy.Or),
    "logical_xor": logical(exclusive),
    **dict.fromkeys(("and", "bitwise_and"), bitwise(sympy.And)),
    **dict.fromkeys(("or", "bitwise_or"), bitwise(sympy.Or)),
    **dict.fromkeys(("xor", "bitwise_xor"), bitwise(exclusive)),
}


@rule("logical_not")
def logical_not(call: Call) -> Expr:
    return negate(as_truth(call.operand(0, "input")))


@rule("invert", "inv", "bitwise_not", "not")
def invert(call: Call) -> Expr:
    expr = call.operand(0, "input")
    if not is_truth(expr):
        raise NotUnderstood("bitwise not on integers")
    return negate(expr)


def comparison(relation: Any) -> Rule:
    def apply(call: Call) -> Expr:
        return compare(relation, call.operand(0, "input"), call.operand(1))

    return apply


VALUE_RULES |= {
    name: comparison(relation)
    for names, relation in (
        (("le", "less_equal"), sympy.Le),
        (("lt", "less"), sympy.Lt),
        (("ge", "greater_equal"), sympy.Ge),
        (("gt", "greater"), sympy.Gt),
        (("eq",), sympy.Eq),
        (("ne", "not_equal"), sympy.Ne),
    )
    for name in names
}


@rule("where")
def where(call: Call) -> Expr:
    """torch.where(condition, x, y), or x.where(condition, y)."""
    condition, yes, no = call.operand(0, "condition"), call.operand(1), call.operand(2)
    if call.node.op == "call_method":
        condition, yes = yes, condition
    return stored_choice(call, as_truth(condition), yes, no)


@rule("masked_fill")
def masked_fill(call: Call) -> Expr:
    return stored_choice(
        call,
        as_truth(call.operand(1, "mask")),
        call.operand(2, "value"),
        call.operand(0),
    )


def stored_choice(call: Call, condition: Expr, yes: Expr, no: Expr) -> Expr:
    if call.dtype == torch.bool:
        return select(condition, as_truth(yes), as_truth(no))
    return cast(Where(condition, as_number(yes), as_number(no)), call.dtype)


# -- arithmetic -------------------------------------------------------------------------------


def arithmetic(function: Callable[..., Expr]) -> Rule:
    """A rule for arithmetic on two operands; `alpha` scales the second."""

    def apply(call: Call) -> Expr:
        left, right = as_number(call.operand(0, "input")), as_number(call.operand(1))
        alpha = call.argument(2, "alpha", 1)
        if alpha != 1:
            right = lift(lambda value: times(value, number(alpha)), right)
        return exact(call, lift(function, left, right))

    return apply


def exact(call: Call, expr: Expr) -> Expr:
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
        raise NotUnderstood("a bias is added, which is no mask")
    if dtype != torch.int64 and any(abs(term) > MAX_CONSTANT for term in constants(value)):
        raise NotUnderstood(f"{dtype} might wrap or round")
    return value


def constants(value: Expr) -> list[Expr]:
    return [atom for atom in value.atoms(sympy.Number) if atom.is_finite]


def times(left: Expr, right: Expr) -> Expr:
    return sympy.expand(left * right)


VALUE_RULES |= {
    "add": arithmetic(lambda left, right: left + right),
    **dict.fromkeys(("sub", "subtract"), arithmetic(lambda left, right: left - right)),
    **dict.fromkeys(("rsub",), arithmetic(lambda left, right: right - left)),
    **dict.fromkeys(("mul", "multiply"), arithmetic(times)),
}


@rule("neg", "negative")
def neg(call: Call) -> Expr:
    return exact(call, lift(lambda value: -value, as_number(call.operand(0, "input"))))


@rule("floordiv", "floor_divide")
def floor_divide(call: Call) -> Expr:
    return quotient(call)


@rule("div", "divide", "truediv", "true_divide")
def divide(call: Call) -> Expr:
    """Division with rounding_mode="floor"; true division of constants only."""
    rounding = call.argument(2, "rounding_mode")
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


def quotient(call: Call) -> Expr:
    def apply(left: Expr, right: Expr) -> Expr:
        if not (left.is_integer and right.is_integer and right.is_positive):
            raise NotUnderstood("floor division by what is not a positive integer")
        return sympy.floor(left / right)

    return exact(call, lift(apply, as_number(call.operand(0, "input")), as_number(call.operand(1))))


@rule("remainder", "mod")
def remainder(call: Call) -> Expr:
    def apply(left: Expr, right: Expr) -> Expr:
        if not (left.is_integer and right.is_integer and right.is_positive):
            raise NotUnderstood("remainder by what is not a positive integer")
        return sympy.Mod(left, right)

    return exact(call, lift(apply, as_number(call.operand(0, "input")), as_number(call.operand(1))))


@rule("abs", "absolute")
def absolute(call: Call) -> Expr:
    zero = number(0)

    def apply(value: Expr) -> Expr:
        return Where(compare(sympy.Lt, value, zero), -value, value)

    return exact(call, lift(apply, as_number(call.operand(0, "input"))))


@rule("minimum", "maximum")
def extremum(call: Call) -> Expr:
    relation = sympy.Le if "min" in str(call.node.target) else sympy.Ge

    def apply(left: Expr, right: Expr) -> Expr:
        return Where(compare(relation, left, right), left, right)

    return exact(call, lift(apply, as_number(call.operand(0, "input")), as_number(call.operand(1))))


# -- along a dimension ------------------------------------------------------------------------


@rule("tril", "triu")
def triangle(call: Call) -> Expr:
    """Zero above (tril) or below (triu) a diagonal of the last two dimensions."""
    expr, shape = call.tensor()
    row, column = axis(len(shape) - 2), axis(len(shape) - 1)
    diagonal = number(call.argument(1, "diagonal", 0))
    lower = "tril" in str(call.node.target)
    kept = compare(sympy.Le if lower else sympy.Ge, column, row + diagonal)
    # Substituting 0 for a unit dimension is right here too: the reader does it to the result.
    return select(kept, expr, sympy.false if is_truth(expr) else number(0))


@rule("cumsum")
def cumsum(call: Call) -> Expr:
    """Of a value that does not change along the dimension: value * (index + 1)."""
    expr, shape = call.tensor()
    along = axis(dimension(call.argument(1, "dim"), len(shape)))
    expr = as_number(expr)
    if isinstance(expr, Where) or along in expr.free_symbols or not expr.is_integer:
        raise NotUnderstood("cumulative sum of what changes along the dimension")
    return exact(call, times(expr, along + 1))


@rule("diff")
def diff(call: Call) -> Expr:
    """First difference along a dimension, with at most one value prepended."""
    expr, shape = call.tensor()
    dim = dimension(call.argument(2, "dim", -1), len(shape))
    prepend = call.argument(3, "prepend")
    if call.argument(1, "n", 1) != 1 or call.argument(4, "append") is not None:
        raise NotUnderstood("higher differences")
    if shape[dim] == 1 or is_truth(expr):
        raise NotUnderstood("difference of what may have one element")
    along = axis(dim)
    if prepend is None:
        return lift(lambda value: step(value, along, along + 1), expr)
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
