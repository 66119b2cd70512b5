"""Sympy expressions for one element of a tensor, in terms of its own indices.

A tensor [s0, s1, ...] is the expression of its element [i0, i1, ...] in the symbols `axis(0)`,
`axis(1)`, ... . Integers are sympy integers, truth values sympy booleans; a choice between numbers
is a `Where`. What is not understood is an uninterpreted function of the indices (`unknown` in
masks/reader.py), which makes every reading sound: nothing is ever assumed about it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import sympy
import torch
from sympy.logic.boolalg import Boolean, BooleanAtom

Expr = Any
"""A sympy expression or boolean; sympy's classes do not type-check."""

BATCH, HEAD, QUERY, KEY = sympy.symbols("b h q k", integer=True, nonnegative=True)
"""Indices of a mask [B, H, Nq, Nk]."""

MAX_LEAVES = 64
"""A choice between more numbers than this is given up as unknown."""


class NotUnderstood(Exception):
    """An op, or its arguments, that the reader has no exact meaning for."""


@functools.cache
def axis(index: int) -> sympy.Symbol:
    """The index along one dimension of a tensor."""
    return sympy.Symbol(f"i{index}", integer=True, nonnegative=True)


class Where(sympy.Expr):
    """`yes` where a condition holds, else `no`: like torch.where, for numbers.

    A choice on the same condition inside of one of them, or on its contrary, is already made.
    """

    def __new__(cls, condition: Expr, yes: Expr, no: Expr) -> Any:
        if isinstance(yes, Where) or isinstance(no, Where):
            contrary = negate(condition)
            yes, no = decided(yes, condition, contrary), decided(no, contrary, condition)
        if condition == sympy.true or yes == no:
            return yes
        if condition == sympy.false:
            return no
        return sympy.Basic.__new__(cls, condition, yes, no)

    def leaves(self) -> int:
        """Number of values that are chosen between."""
        return sum(arg.leaves() if isinstance(arg, Where) else 1 for arg in self.args[1:])


def decided(expr: Expr, true: Expr, false: Expr) -> Expr:
    """A choice where one condition holds and another does not."""
    if not isinstance(expr, Where):
        return expr
    condition, yes, no = expr.args
    if condition == true:
        return decided(yes, true, false)
    if condition == false:
        return decided(no, true, false)
    chosen = decided(yes, true, false), decided(no, true, false)
    return expr if chosen == (yes, no) else Where(condition, *chosen)


def number(value: Any) -> Expr:
    """A constant of the graph: bool, int, float, SymInt; an expression as it is."""
    if isinstance(value, sympy.Basic):
        return value
    if isinstance(value, bool):
        return sympy.true if value else sympy.false
    if isinstance(value, int):
        return sympy.Integer(value)
    if isinstance(value, float):
        if math.isnan(value):
            raise NotUnderstood("nan")
        if math.isinf(value):
            return sympy.oo if value > 0 else -sympy.oo
        return sympy.Integer(int(value)) if value.is_integer() else sympy.Float(value)
    if isinstance(value, torch.SymInt):
        return value.node.expr
    raise NotUnderstood(f"constant {value!r}")


def is_truth(expr: Expr) -> bool:
    """Whether an expression is a truth value (a bare symbol is a number here)."""
    return isinstance(expr, Boolean) and not isinstance(expr, sympy.Symbol)


def as_number(expr: Expr) -> Expr:
    """A truth value as 1 or 0."""
    if not is_truth(expr):
        return expr
    return Where(expr, sympy.Integer(1), sympy.Integer(0))


def as_truth(expr: Expr) -> Expr:
    """A number as `number != 0`."""
    return expr if is_truth(expr) else compare(sympy.Ne, expr, sympy.Integer(0))


def lift(function: Callable[..., Expr], *operands: Expr) -> Expr:
    """Apply a function of plain numbers to operands that may be choices between numbers."""
    return _lift(function, operands, [0])


def _lift(function: Callable[..., Expr], operands: tuple[Expr, ...], count: list[int]) -> Expr:
    choice = next((operand for operand in operands if isinstance(operand, Where)), None)
    if choice is None:
        count[0] += 1
        if count[0] > MAX_LEAVES:
            raise NotUnderstood("a choice between too many values")
        return function(*operands)
    condition = choice.args[0]

    def branch(truth: int) -> Expr:
        chosen = tuple(
            operand.args[truth]
            if isinstance(operand, Where) and operand.args[0] == condition
            else operand
            for operand in operands
        )
        return _lift(function, chosen, count)

    return select(condition, branch(1), branch(2))


def select(condition: Expr, yes: Expr, no: Expr) -> Expr:
    """`yes` where the condition holds, else `no`, for numbers or truth values."""
    if not (is_truth(yes) and is_truth(no)):
        return Where(condition, as_number(yes), as_number(no))
    if condition == sympy.true or yes == no:
        return yes
    if condition == sympy.false:
        return no
    if isinstance(yes, BooleanAtom) and isinstance(no, BooleanAtom):
        return condition if yes else negate(condition)
    if isinstance(no, BooleanAtom):
        return sympy.Or(negate(condition), yes) if no else sympy.And(condition, yes)
    if isinstance(yes, BooleanAtom):
        return sympy.Or(condition, no) if yes else sympy.And(negate(condition), no)
    return sympy.Or(sympy.And(condition, yes), sympy.And(negate(condition), no))


def negate(expr: Expr) -> Expr:
    """Logical not, pushed down to comparisons."""
    if isinstance(expr, sympy.And):
        return sympy.Or(*map(negate, expr.args))
    if isinstance(expr, sympy.Or):
        return sympy.And(*map(negate, expr.args))
    return sympy.Not(expr)


def compare(relation: Any, left: Expr, right: Expr) -> Expr:
    """A comparison (sympy.Le, Eq, ...) of two numbers or choices; decided where constant."""
    return lift(functools.partial(_compare, relation), as_number(left), as_number(right))


def _compare(relation: Any, left: Expr, right: Expr) -> Expr:
    if left.is_infinite or right.is_infinite:
        if not (left.is_number and right.is_number):
            raise NotUnderstood("comparison with infinity")
        return relation(left, right)
    difference = left - right
    if difference.is_number:
        return relation(difference, 0)
    return relation(left, right, evaluate=False)


def substitute(expr: Expr, replacement: dict[Expr, Expr]) -> Expr:
    """Replace symbols simultaneously."""
    changed = {old: new for old, new in replacement.items() if old != new}
    return expr.xreplace(changed) if changed else expr
