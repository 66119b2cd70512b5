"""Scores while masks are put on them: wherever a key is seen, they must still be themselves.

The ops that put masks on scores (add, where, masked_fill, casts) are affine in the score, so two
scores tell: a key is seen where 0 remains 0 and 1 remains 1, and hidden where both become very
negative. Anything else scales the scores, or replaces them by a number that hides nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy

from mpass.masks.conjuncts import HIDDEN, visible
from mpass.masks.expressions import Expr, Where, lift

PROBES = (sympy.Integer(0), sympy.Integer(1))
"""The scores that are put in."""

ROUNDS_SCORES_OFF = -1e30
"""A score below 1e20 that is added to this is rounded off, in every dtype that holds it."""


def seen_scores(values: tuple[Expr, Expr], one: Expr = PROBES[1]) -> Expr | None:
    """When a key is seen, from what became of the two scores; None if they were changed.

    one: what a seen score of 1 has to be, which the masks may multiply.
    """
    of_zero, of_one = values
    condition = visible(of_zero)
    if condition is None or visible(lift(lambda value: value - one, of_one)) != condition:
        return None
    return condition


def scaled(value: Expr, factor: float) -> Expr:
    """A score times a positive number, and so what hides it.

    Masks are read as they are in exact numbers; rounding a product changes none of 0 and infinity.
    """
    return lift(lambda number: number * sympy.Rational(factor), value)


@dataclass(frozen=True)
class HiddenRows:
    """What eager attention makes of a row whose keys are all hidden.

    finite: some keys are hidden by a finite number: the row is not NaN, but a mean of values. mean:
    it is the mean of all values: every hidden score becomes one and the same number, because that
    takes the place of the score, or is so large that the score is rounded off.
    """

    finite: bool
    mean: bool


def hidden_rows(of_zero: Expr, of_one: Expr | None = None) -> HiddenRows:
    """What rows without keys are, from what became of the two scores.

    of_one: None where a mask is added to the scores.
    """
    numbers = hidden_numbers(of_zero)
    replaced = of_one is not None and hidden_numbers(of_one) == numbers
    alike = len(numbers) == 1 and (replaced or max(numbers) <= ROUNDS_SCORES_OFF)
    return HiddenRows(any(number.is_finite for number in numbers), alike)


def hidden_numbers(value: Expr) -> set[Expr]:
    """The numbers that hidden scores become."""
    if isinstance(value, Where):
        return {number for arg in value.args[1:] for number in hidden_numbers(arg)}
    return {value} if value.is_number and value != sympy.nan and value <= HIDDEN else set()
