"""Patterns as text: on the command line, in options, in configs and in calls of functions."""

from __future__ import annotations

import ast
import dataclasses
from typing import TYPE_CHECKING

from mpass.errors import MpassError, OptionValueError

if TYPE_CHECKING:
    from mpass.patterns.base import Pattern


def parse_pattern(text: str) -> Pattern:
    """A pattern from `name`, `name(1000, 512)` or `name(slash_size=512)`.

    `str(pattern)` writes the second form.
    Raises UnknownPatternError, PatternValueError, and OptionValueError for what is not a call.
    """
    from mpass.patterns.base import check_types, find_pattern

    malformed = OptionValueError("pattern", text, "NAME, NAME(1, 2) or NAME(field=1)")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise malformed from None
    if isinstance(tree, ast.Name):
        return find_pattern(tree.id)()
    if not (isinstance(tree, ast.Call) and isinstance(tree.func, ast.Name)):
        raise malformed
    cls = find_pattern(tree.func.id)
    fields = [field.name for field in dataclasses.fields(cls)]
    try:
        values = dict(zip(fields, map(ast.literal_eval, tree.args), strict=False))
        named = {str(item.arg): ast.literal_eval(item.value) for item in tree.keywords}
    except ValueError:
        raise malformed from None
    unknown = [name for name in named if name not in fields or name in values]
    if unknown or len(tree.args) > len(fields):
        at_fault = unknown[0] if unknown else f"{len(tree.args)} values"
        allowed = f"{cls.name} with the fields {', '.join(fields) or '(none)'}, each once"
        raise OptionValueError("pattern", f"{text}: {at_fault}", allowed)
    pattern = cls(**values, **named)
    check_types(pattern)
    return pattern


def short_form(text: str) -> str:
    """A pattern's text with the fields that differ from their defaults, by name.

    `union(0.6, 0.018, 256, ...)` becomes `union(mass=0.9)` or, as it is by default, `union`.
    `parse_pattern` reads it. What is no pattern that is registered here stays as it is.
    """
    try:
        return parse_pattern(text).in_words()
    except MpassError:
        return text
