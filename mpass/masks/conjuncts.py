"""Classifying the conjuncts of a mask: causal, window, valid length, padding, or unknown.

A mask is the condition under which query q of batch row b and head h sees key k. It is split at its
`and`s; each part must be one of the forms that the sparse ops know, or the mask is not proven.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import sympy

from mpass.lowering.mask_forms import HIDDEN
from mpass.masks.bands import as_band
from mpass.masks.expressions import BATCH, HEAD, KEY, QUERY, Expr, Where, is_truth, negate, select


@dataclass(frozen=True)
class MaskSizes:
    """Sizes that a mask's indices run over: batch, heads, queries, keys."""

    batch: Expr
    heads: Expr
    queries: Expr
    keys: Expr

    def last(self, symbol: Expr) -> Expr | None:
        """Largest value of an index; None for other symbols."""
        sizes = {BATCH: self.batch, HEAD: self.heads, QUERY: self.queries, KEY: self.keys}
        size = sizes.get(symbol)
        return None if size is None else size - 1


@dataclass
class MaskTerms:
    """The classified conjuncts of a mask.

    offset: of `k <= q + offset`. width: of `q - k < width`, before the offset is known.
    valid: of `k < valid`. padding: terms in b and k only. unknown: terms of no known form.
    """

    offset: Expr | None = None
    width: Expr | None = None
    valid: Expr | None = None
    padding: list[Expr] = field(default_factory=list)
    unknown: list[Expr] = field(default_factory=list)
    dropped: list[Expr] = field(default_factory=list)


def visible(expr: Expr) -> Expr | None:
    """When an additive float mask (0 or very negative) lets a key be seen; None if it is a bias.

    Truth values are returned as they are.
    """
    if is_truth(expr):
        return expr
    if isinstance(expr, Where):
        condition, yes, no = expr.args
        seen, other = visible(yes), visible(no)
        return None if seen is None or other is None else select(condition, seen, other)
    if expr == 0:
        return sympy.true
    if expr.is_number and expr is not sympy.nan and expr <= HIDDEN:
        return sympy.false
    return None


def classify_conjuncts(condition: Expr, sizes: MaskSizes) -> MaskTerms:
    """Classify the conjuncts of a mask's condition."""
    terms = MaskTerms()
    for term in conjuncts(condition):
        classify_conjunct(term, sizes, terms)
    if terms.valid is not None and terms.offset is not None:
        # The last query sees no key beyond its own position: a longer valid length says nothing.
        if at_most(sizes.queries + terms.offset, terms.valid):
            terms.dropped.append(KEY < terms.valid)
            terms.valid = None
    return terms


def conjuncts(condition: Expr) -> list[Expr]:
    """The parts of a condition that must all hold."""
    if condition == sympy.true:
        return []
    if isinstance(condition, sympy.And):
        return [part for arg in condition.args for part in conjuncts(arg)]
    if isinstance(condition, sympy.Not):
        pushed = negate(condition.args[0])
        return [pushed] if isinstance(pushed, sympy.Not) else conjuncts(pushed)
    return [condition]


def classify_conjunct(term: Expr, sizes: MaskSizes, terms: MaskTerms) -> None:
    """Classify one conjunct and add it to `terms`."""
    symbols = term.free_symbols
    if HEAD in symbols:
        terms.unknown.append(term)
        return
    band = as_band(term, at_most_zero)
    if band:
        for part in band:
            classify_conjunct(part, sizes, terms)
        return
    difference = at_most_zero(term)
    if difference is not None and BATCH not in symbols:
        rest = sympy.expand(difference)
        of_key, of_query = rest.coeff(KEY), rest.coeff(QUERY)
        rest = sympy.expand(rest - of_key * KEY - of_query * QUERY)
        if not rest.has(KEY, QUERY) and classify_linear(of_key, of_query, rest, terms):
            return
        decoding = sizes.queries == 1 or of_key == 0
        if decoding and QUERY not in symbols and has_function(rest):
            # `k <= position` of a single query: the position is data, no row of a key mask. Nor is
            # data that hides all keys or none. `k < length` of several queries is one.
            terms.unknown.append(term)
            return
    if holds(term, sizes):
        terms.dropped.append(term)
    elif QUERY not in symbols:
        terms.padding.append(term)
    else:
        terms.unknown.append(term)


def classify_linear(of_key: Expr, of_query: Expr, rest: Expr, terms: MaskTerms) -> bool:
    """Classify `of_key * k + of_query * q + rest <= 0`; False if it is of no known form."""
    if (of_key, of_query) == (1, -1):
        bound = smaller(terms.offset, -rest)
        if bound is not None:
            terms.offset = bound
            return True
    elif (of_key, of_query) == (-1, 1):
        bound = smaller(terms.width, 1 - rest)
        if bound is not None:
            terms.width = bound
            return True
    elif (of_key, of_query) == (1, 0) and not has_function(rest):
        bound = smaller(terms.valid, 1 - rest)
        if bound is not None:
            terms.valid = bound
            return True
    return False


def has_function(expr: Expr) -> bool:
    """Whether an expression reads a tensor of the graph."""
    return bool(expr.atoms(sympy.core.function.AppliedUndef))


def smaller(left: Expr | None, right: Expr) -> Expr | None:
    """The smaller of two bounds, of which the first may be missing; None if that is not known."""
    if left is None or at_most(right, left):
        return right
    return left if at_most(left, right) else None


def at_most(left: Expr, right: Expr) -> bool:
    """Whether `left <= right` for all sizes."""
    return bool((left - right).is_nonpositive)


def at_most_zero(term: Expr) -> Expr | None:
    """The integer expression e of a term that says `e <= 0`; None for other terms."""
    if not isinstance(term, (sympy.Le, sympy.Lt, sympy.Ge, sympy.Gt)):
        return None
    left, right = term.args
    if isinstance(term, (sympy.Ge, sympy.Gt)):
        left, right = right, left
    if isinstance(left, Where) or isinstance(right, Where):
        return None
    if not (left.is_integer and right.is_integer):
        return None
    strict = isinstance(term, (sympy.Lt, sympy.Gt))
    return left - right + (1 if strict else 0)


def holds(term: Expr, sizes: MaskSizes) -> bool:
    """Whether a term holds for all indices."""
    if isinstance(term, sympy.Or):
        return any(holds(arg, sizes) for arg in term.args)
    if isinstance(term, sympy.And):
        return all(holds(arg, sizes) for arg in term.args)
    if isinstance(term, sympy.Eq):
        left, right = (bounds(arg, sizes) for arg in term.args)
        ends = {*left, *right}
        return len(ends) == 1 and None not in ends
    difference = at_most_zero(term)
    if difference is None:
        return False
    high = bounds(sympy.expand(difference), sizes)[1]
    return high is not None and bool(high.is_nonpositive)


Bounds = tuple[Expr | None, Expr | None]


def bounds(expr: Expr, sizes: MaskSizes) -> Bounds:
    """Smallest and largest value over all indices, in terms of sizes; None where not known."""
    if isinstance(expr, sympy.Symbol):
        last = sizes.last(expr)
        return (expr, expr) if last is None else (sympy.Integer(0), last)
    if expr.is_number:
        return expr, expr
    if isinstance(expr, sympy.Add):
        parts = [bounds(arg, sizes) for arg in expr.args]
        low = None if any(p[0] is None for p in parts) else sympy.Add(*[p[0] for p in parts])
        high = None if any(p[1] is None for p in parts) else sympy.Add(*[p[1] for p in parts])
        return low, high
    if isinstance(expr, sympy.Mul):
        factor, rest = expr.as_coeff_Mul()
        if factor == 1 or not factor.is_number:
            return (expr, expr) if not expr.has(BATCH, HEAD, QUERY, KEY) else (None, None)
        low, high = bounds(rest, sizes)
        ends = tuple(None if end is None else factor * end for end in (low, high))
        return ends if factor.is_positive else ends[::-1]  # type: ignore[return-value]
    if isinstance(expr, sympy.floor):
        low, high = bounds(expr.args[0], sizes)
        return (
            None if low is None else sympy.floor(low),
            None if high is None else sympy.floor(high),
        )
    return None, None
