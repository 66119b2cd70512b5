"""Scores while masks are put on them: wherever a key is seen, they must still be themselves.

The ops that put masks on scores (add, where, masked_fill, casts) are affine in the score, so two
scores tell: a key is seen where 0 remains 0 and 1 remains 1, and hidden where both become very
negative. Anything else scales the scores, or replaces them by a number that hides nothing.
"""

from __future__ import annotations

import sympy

from mpass.masks.conjuncts import HIDDEN, visible
from mpass.masks.expressions import Expr, Where, lift

PROBES = (sympy.Integer(0), sympy.Integer(1))
"""The scores that are put in."""


def seen_scores(values: tuple[Expr, Expr]) -> Expr | None:
    """When a key is seen, from what became of the two scores; None if they were changed."""
    of_zero, of_one = values
    condition = visible(of_zero)
    if condition is None or visible(lift(lambda value: value - 1, of_one)) != condition:
        return None
    return condition


def hides_finitely(value: Expr) -> bool:
    """Whether a mask hides keys by a finite number, so that a row without any key is their mean."""
    if isinstance(value, Where):
        return any(hides_finitely(arg) for arg in value.args[1:])
    return bool(value.is_number and value.is_finite and value <= HIDDEN)
