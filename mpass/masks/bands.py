"""Bands of a mask: conditions on the distance between query and key, written as choices.

`abs(q - k) <= w` is read as `(q - k >= 0 and q - k <= w) or (q - k < 0 and k - q <= w)`. Each
alternative is a range of distances `k - q`; where their union has no gap, it is two inequalities
that hold together.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import sympy

from mpass.masks.expressions import KEY, QUERY, Expr

Range = tuple[Expr, Expr]
"""Least and greatest `k - q`: integers, or minus and plus infinity."""


def as_band(term: Expr, at_most_zero: Callable[[Expr], Expr | None]) -> list[Expr] | None:
    """Inequalities that must all hold in place of alternatives; None where they are no one band.

    at_most_zero: the integer expression e of a comparison that says `e <= 0`, else None.
    """
    if not isinstance(term, sympy.Or):
        return None
    ranges = [distances(alternative, at_most_zero) for alternative in term.args]
    known = [item for item in ranges if item is not None]
    if len(known) < len(ranges):
        return None
    whole = without_gap(known)
    if whole is None:
        return None
    least, greatest = whole
    band = []
    if greatest.is_finite:
        band.append(sympy.Le(KEY - QUERY, greatest, evaluate=False))
    if least.is_finite:
        band.append(sympy.Le(QUERY - KEY, -least, evaluate=False))
    return band


def distances(condition: Expr, at_most_zero: Callable[[Expr], Expr | None]) -> Range | None:
    """The range of `k - q` that a condition allows; None if it says anything else."""
    parts = condition.args if isinstance(condition, sympy.And) else (condition,)
    least, greatest = -sympy.oo, sympy.oo
    for part in parts:
        difference = at_most_zero(part)
        if difference is None:
            return None
        rest = sympy.expand(difference)
        sign = rest.coeff(KEY)
        constant = sympy.expand(rest - sign * (KEY - QUERY))
        if sign not in (1, -1) or not constant.is_Integer:
            return None
        if sign == 1:
            greatest = sympy.Min(greatest, -constant)
        else:
            least = sympy.Max(least, constant)
    return least, greatest


def without_gap(ranges: Iterable[Range]) -> Range | None:
    """The union of ranges of integers; None if it has a gap or is empty."""
    filled = sorted((item for item in ranges if item[0] <= item[1]), key=lambda item: item[0])
    if not filled:
        return None
    least, greatest = filled[0]
    for start, stop in filled[1:]:
        if start > greatest + 1:
            return None
        greatest = sympy.Max(greatest, stop)
    return least, greatest
