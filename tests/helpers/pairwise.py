"""Few cases of many parameters: each value of one met with each value of every other.

Faults that need two values at once are found as by the whole product; what needs three is not.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from typing import Any

Case = tuple[Any, ...]


def value_pairs(case: Case) -> set[tuple[int, Any, int, Any]]:
    """The pairs of values that a case shows: (parameter, value, other parameter, its value)."""
    return {(i, case[i], j, case[j]) for i, j in itertools.combinations(range(len(case)), 2)}


def pairwise(
    *values: Iterable[Any], allowed: Callable[..., bool] = lambda *case: True
) -> list[Case]:
    """Cases, one value per parameter, that show every pair of values which any case can show.

    values: the values of each parameter.
    allowed: says whether a combination exists at all.

    Greedy: the case that shows most new pairs comes next, the first of equals. The same every time.
    """
    product = [case for case in itertools.product(*values) if allowed(*case)]
    shown = {case: value_pairs(case) for case in product}
    missing = set().union(*shown.values())
    cases = []
    while missing:
        best = max(product, key=lambda case: len(shown[case] & missing))
        cases.append(best)
        missing -= shown[best]
    return cases
