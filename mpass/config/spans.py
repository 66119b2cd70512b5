"""Runs of layers or heads: `7`, `0-3` and `16-`."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from mpass.errors import OptionValueError

MAX_COUNT = 4096
"""Layers, and heads per layer, that a config may name: far above any model, far below a typo."""

SPAN = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?", re.ASCII)
"""`7`, `0-3` or `16-`."""


@dataclass(frozen=True, order=True)
class Span:
    """A run of layers or heads, `first` to `last`, both included; last None for all that follow.

    Written `7`, `0-3` or `16-`.
    """

    first: int
    last: int | None

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        return self.first <= number and (self.last is None or number <= self.last)

    def overlaps(self, other: Span) -> bool:
        """Whether the two have a number in common."""
        return (self.last is None or other.first <= self.last) and (
            other.last is None or self.first <= other.last
        )

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first}-"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


def as_span(key: object, what: str) -> Span:
    """A Span from `3`, `"3"`, `"0-3"`, `"16-"` or `range(4)`. what: "layer" or "head"."""
    span = None
    if isinstance(key, Span):
        span = key
    elif isinstance(key, int) and not isinstance(key, bool):
        span = Span(key, key)
    elif isinstance(key, range) and key.step == 1 and len(key):
        span = Span(key[0], key[-1])
    elif isinstance(key, str) and (match := SPAN.fullmatch(key)):
        start, dash, stop = match.groups()
        last = start if dash is None else stop
        span = Span(int(start), int(last) if last else None)
    allowed = f"a {what} from 0 to {MAX_COUNT - 1}, or a span of them like '0-3' or '16-'"
    if span is None or span.first < 0 or max(span.first, span.last or 0) >= MAX_COUNT:
        raise OptionValueError(f"config {what}s", key, allowed)
    if span.last is not None and span.last < span.first:
        raise OptionValueError(f"config {what}s", key, allowed)
    return span


def in_spans(numbers: Iterable[int]) -> str:
    """`0-3, 5` for ascending numbers."""
    spans: list[Span] = []
    for number in numbers:
        if spans and spans[-1].last == number - 1:
            spans[-1] = Span(spans[-1].first, number)
        else:
            spans.append(Span(number, number))
    return ", ".join(map(str, spans))
