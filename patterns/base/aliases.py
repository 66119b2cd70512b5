"""What patterns of other packages may still say as it was: old names, and arguments one by one.

`Pattern` applies both to every class that derives from it. No pattern of its own.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from mpass.lowering.inputs import EstimateInputs

RENAMED = {
    "fewest_keys": "min_keys",
    "least_share": "min_density",
    "budgeted": "fixed_budget",
    "static": "input_independent",
}
"""Older names of attributes of a pattern's class, and what they are called now."""


def keep_old_names(cls: type) -> None:
    """Give a class what it defines by one of both names by the other one as well."""
    own = dict(vars(cls))
    for old, new in RENAMED.items():
        if new in own and old not in own:
            setattr(cls, old, own[new])
        elif old in own and new not in own:
            setattr(cls, new, own[old])


def keep_old_calls(cls: type) -> None:
    """Let `estimate` and `select` of a class be written and called in both ways.

    Either `(inputs, patterns)`, or as it was, `(query, key, mask, heads, patterns, *, scale)`.
    """
    for name in ("estimate", "select"):
        method = vars(cls).get(name)
        if isinstance(method, classmethod):
            setattr(cls, name, classmethod(callable_both_ways(method.__func__)))


def callable_both_ways(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function of a class and the arguments above, whichever of both it takes itself."""
    takes_tensors = takes_each(function, leading=1)

    @functools.wraps(function)
    def call(cls: type, *arguments: Any, **named: Any) -> Any:
        inputs, rest = packed(*arguments, **named)
        if takes_tensors:
            return function(cls, *unpacked(inputs), *rest, scale=inputs.scale)
        return function(cls, inputs, *rest)

    return call


def takes_each(function: Callable[..., Any], leading: int = 0) -> bool:
    """Whether a function takes query, key, mask and heads one by one, after `leading` others."""
    names = list(inspect.signature(function).parameters)[leading:]
    return len(names) > 2 and names[0] != "inputs"


def packed(*arguments: Any, **named: Any) -> tuple[EstimateInputs, tuple[Any, ...]]:
    """The inputs, from one record or one by one, and the arguments that come after them."""
    if "inputs" in named or (arguments and isinstance(arguments[0], EstimateInputs)):
        inputs = named.pop("inputs") if "inputs" in named else arguments[0]
        rest = arguments if not arguments or inputs is not arguments[0] else arguments[1:]
        return inputs, (*rest, *named.values())
    places = ("query", "key", "mask", "heads")
    values = dict(zip(places, arguments, strict=False)) | {
        n: named.pop(n) for n in places if n in named
    }
    scale = named.pop("scale")
    return EstimateInputs(**values, scale=scale), (*arguments[4:], *named.values())


def unpacked(inputs: EstimateInputs) -> tuple[Any, ...]:
    """What stands before the patterns or rules where arguments are given one by one."""
    return inputs.query, inputs.key, inputs.mask, inputs.heads
