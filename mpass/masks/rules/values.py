"""Rules for ops that make values, convert, compare or choose between them: element of the result
from elements of the operands.

A rule either is exact or raises `NotUnderstood`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.call_keys import constant
from mpass.graph.nodes import example, op_name
from mpass.masks.elements import unwrap_constant
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
    negate,
    number,
    select,
)
from mpass.masks.reader import OpCall, Rule, registrar

VALUE_RULES: dict[str, Rule] = {}

EXACT_DTYPES = (torch.int64, torch.int32, torch.float64, torch.float32)
"""dtypes that hold every position of a sequence exactly (float32 below 2**24)."""

NUMBER_DTYPES = (
    *EXACT_DTYPES,
    torch.float16,
    torch.bfloat16,
    torch.int16,
    torch.int8,
    torch.uint8,
)
"""dtypes of numbers; others round, saturate or have no infinity (8-bit floats)."""

LARGE = 4096.0
"""Numbers of at least this magnitude stand for infinity in a mask, so rounding is no matter."""


rule = registrar(VALUE_RULES)


# -- constants --------------------------------------------------------------------------------


@rule("placeholder")
def placeholder(call: OpCall) -> Expr:
    return call.reader.unknown(call.node)


@rule("get_attr")
def get_attr(call: OpCall) -> Expr:
    """A constant of one element that tracing lifted out of the program; else an input."""
    name = str(call.node.target)
    owner = call.node.graph.owning_module
    value = getattr(owner, name, None) if owner is not None and "." not in name else None
    lifted = "tensor_constant" in name or "lifted_tensor" in name
    if lifted and isinstance(value, torch.Tensor) and value.numel() == 1:
        return number(value.item())
    return call.reader.unknown(call.node)


@rule("arange")
def arange(call: OpCall) -> Expr:
    """arange(end), arange(start, end), arange(start, end, step), or by keywords."""
    call.argument(None, "dtype")
    bounds = [value for value in call.node.args if not isinstance(value, torch.dtype)][:3]
    if len(bounds) == 1 and "end" not in call.node.kwargs:
        start, end = 0, call.argument(0)
    elif "start" in call.node.kwargs or not bounds:
        start, end = call.argument(None, "start", 0), call.argument(0, "end")
    else:
        start, end = call.argument(0), call.argument(1, "end")
    start, step = number(start), number(call.argument(2, "step", 1))
    number(end)
    if not (start.is_integer and step.is_integer) or call.dtype not in EXACT_DTYPES:
        raise NotUnderstood("arange of fractions, or in a dtype that does not hold every position")
    return start + step * axis(0)


@rule("ones", "new_ones", "ones_like")
def ones(call: OpCall) -> Expr:
    call.skip(0)
    return sympy.true if call.dtype == torch.bool else number(1)


@rule("zeros", "new_zeros", "zeros_like", "zero")
def zeros(call: OpCall) -> Expr:
    call.skip(0)
    return sympy.false if call.dtype == torch.bool else number(0)


@rule("full", "new_full", "full_like")
def full(call: OpCall) -> Expr:
    place = 2 if op_name(call.node) == "new_full" else 1
    value = call.argument(place, "fill_value")
    call.skip(0)
    return stored(call, value)


@rule("fill")
def fill(call: OpCall) -> Expr:
    call.raw(0, "input")
    return stored(call, call.argument(1, "value"))


@rule("tensor", "scalar_tensor", "as_tensor")
def tensor(call: OpCall) -> Expr:
    value = call.argument(0, "data", call.argument(0, "s"))
    call.skip(1)
    if isinstance(value, (list, tuple)) and len(value) == 1:
        value = unwrap_constant(value[0])
    if isinstance(value, (list, tuple)):
        raise NotUnderstood("a tensor of several constants")
    return stored(call, value)


def stored(call: OpCall, value: Any) -> Expr:
    """A number as the result's dtype holds it."""
    return cast(call.broadcast(value), call.dtype)


# -- dtype ------------------------------------------------------------------------------------


@rule("to", "type", "to_copy", "type_as", "float", "double", "half", "bfloat16", "int", "long")
@rule("bool", "convert_element_type", "copy", "lift_fresh_copy", "lift_fresh")
@rule("contiguous", "clone", "detach", "alias", "cpu", "cuda")
def convert(call: OpCall) -> Expr:
    """dtype and device conversions, and copies: the value as the result's dtype holds it."""
    if op_name(call.node) == "copy":
        call.raw(0, "input")
        call.argument(2, "non_blocking")
        return cast(call.operand(1, "src"), call.dtype)
    expr, _ = call.tensor()
    call.skip()
    return cast(expr, call.dtype)


def cast(expr: Expr, dtype: torch.dtype) -> Expr:
    """The value of an expression in another dtype."""
    if dtype == torch.bool:
        return as_truth(expr)
    return lift(lambda value: cast_number(value, dtype), as_number(expr))


def cast_number(value: Expr, dtype: torch.dtype) -> Expr:
    """A number in another dtype, if that holds it exactly; very large magnitudes may be rounded."""
    if dtype not in NUMBER_DTYPES:
        raise NotUnderstood(f"{dtype} is not served")
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

    def apply(call: OpCall) -> Expr:
        return function(as_truth(call.operand(0, "input")), as_truth(call.operand(1)))

    return apply


def bitwise(function: Callable[..., Expr]) -> Rule:
    """The same for a bitwise op, which is logical on truth values only."""

    def apply(call: OpCall) -> Expr:
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
def logical_not(call: OpCall) -> Expr:
    return negate(as_truth(call.operand(0, "input")))


@rule("invert", "inv", "bitwise_not", "not")
def invert(call: OpCall) -> Expr:
    expr = call.operand(0, "input")
    if not is_truth(expr):
        raise NotUnderstood("bitwise not on integers")
    return negate(expr)


def comparison(relation: Any) -> Rule:
    """A rule for a comparison, which torch makes in the common dtype of its operands."""

    def apply(call: OpCall) -> Expr:
        left, right = call.operand(0, "input"), call.operand(1)
        given = (call.argument(0, "input"), call.argument(1, "other"))
        dtype = common_dtype(*given)
        if dtype is not None and dtype.is_floating_point:
            left = promoted(left, given[0], dtype)
            right = promoted(right, given[1], dtype)
        return compare(relation, left, right)

    return apply


def promoted(expr: Expr, argument: Any, dtype: torch.dtype) -> Expr:
    """An operand in the floating-point dtype that it is compared in."""
    if isinstance(argument, fx.Node):
        return expr if example(argument).dtype == dtype else cast(expr, dtype)
    if isinstance(argument, float):
        return number(float(torch.tensor(argument, dtype=dtype)))
    return cast(expr, dtype)


def common_dtype(left: Any, right: Any) -> torch.dtype | None:
    """dtype that two operands are brought to; None for two numbers."""
    values = [example(value) if isinstance(value, fx.Node) else value for value in (left, right)]
    if not any(isinstance(value, torch.Tensor) for value in values):
        return None
    plain = [constant(value) for value in values]
    return torch.result_type(*plain)


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
def where(call: OpCall) -> Expr:
    """torch.where(condition, x, y), or x.where(condition, y)."""
    if call.node.op == "call_method":
        yes, condition = call.operand(0, "input"), call.operand(1, "condition")
    else:
        condition, yes = call.operand(0, "condition"), call.operand(1, "input")
    return stored_choice(call, as_truth(condition), yes, call.operand(2))


@rule("masked_fill")
def masked_fill(call: OpCall) -> Expr:
    return stored_choice(
        call,
        as_truth(call.operand(1, "mask")),
        call.operand(2, "value"),
        call.operand(0, "input"),
    )


def stored_choice(call: OpCall, condition: Expr, yes: Expr, no: Expr) -> Expr:
    if call.dtype == torch.bool:
        return select(condition, as_truth(yes), as_truth(no))
    return cast(Where(condition, as_number(yes), as_number(no)), call.dtype)
