"""Sizes of a graph compared: by what is known of them, else by a guard that the graph then carries.

A guard (of the shape environment, see `may_guard`) limits a graph to the calls in which what was
asked is true; Dynamo makes another graph for others. It is only put where the answer is yes in the
call that is being compiled, and only on facts without which the program would fail or hardly ever
run (key and value of one length, a mask of the scores' size), so that it costs no graphs.
"""

from __future__ import annotations

import math
from typing import Any

import sympy
import torch
from torch._guards import TracingContext
from torch.fx.experimental.symbolic_shapes import (
    free_symbols,
    free_unbacked_symbols,
    statically_known_true,
)

Size = int | torch.SymInt


def is_unbacked(size: object) -> bool:
    """Whether a size has no value while compiling, so that no guard may be put on it."""
    return isinstance(size, torch.SymInt) and bool(free_unbacked_symbols(size))


def has_user_range(length: Size) -> bool:
    """Whether a range constraint (mark_dynamic's min and max, torch.export) forbids new guards.

    A range that follows from guards, as where positions are looked up in a table of 512 rows,
    forbids none.
    """
    if not isinstance(length, torch.SymInt):
        return False
    env = length.node.shape_env
    for symbol in free_symbols(length):
        upper = env.var_to_range[symbol].upper
        bounded = not (upper.is_infinite or upper > math.inf) and int(upper) < 2**62
        if bounded and is_constrained(symbol, env):
            return True
    return False


def is_constrained(symbol: Any, env: Any) -> bool:
    """Whether a user gave a range for the size that a symbol stands for.

    True as well where a shape environment does not tell which tensors its sizes come from.
    """
    if not env.tracked_fakes:
        return True
    for tracked in env.tracked_fakes:
        constraints = getattr(tracked.symbolic_context, "constraint_sizes", None)
        if not isinstance(tracked.fake, torch.Tensor) or not constraints:
            continue
        for size, constraint in zip(tracked.fake.shape, constraints, strict=False):
            # Dynamo's own constraints say that a size is dynamic, and no range.
            if hasattr(constraint, "vr") and symbol in free_symbols(size):
                return True
    return False


def may_guard(*sizes: Size) -> bool:
    """Whether a guard on sizes holds: Dynamo is compiling, all are known, and no range is broken.

    Guards are built after the backend returns, so one that a pass installs is among them. An
    exported program has no guards.
    """
    if TracingContext.try_get() is None:
        return False
    return not any(is_unbacked(size) or has_user_range(size) for size in sizes)


def holds(condition: bool | torch.SymBool, *about: Size) -> bool:
    """Whether a condition about sizes is true in every call that the graph serves.

    A guard makes it so where it is true now. A condition that is false now gets none.
    """
    if isinstance(condition, bool) or statically_known_true(condition):
        return bool(condition)
    if not may_guard(*about) or not true_now(condition):
        return False
    return bool(condition)


def true_now(condition: torch.SymBool) -> bool:
    """Whether a condition is true in the call that is being compiled; adds no guard."""
    env: Any = condition.node.shape_env
    value = condition.node.expr.xreplace(env.backed_var_to_val)
    return bool(value == sympy.true)


def agree(left: Size, right: Size) -> bool:
    """Whether two sizes are equal in every call that the graph serves, by a guard if need be.

    What both are made of needs no guard: lengths of caches may be compared beside new tokens whose
    number has a range.
    """
    if isinstance(left, torch.SymInt) and isinstance(right, torch.SymInt):
        return holds(left - right == 0, left - right)
    return holds(left == right, left, right)


def current(expression: Any, like: Any) -> Any:
    """A sympy expression with symbols that guards have made equal to others named as these.

    like: sizes, one of which may know the shape environment.
    """
    for size in like:
        if isinstance(size, torch.SymInt):
            renamed = {s: size.node.shape_env.replace(s) for s in expression.free_symbols}
            changed = {old: new for old, new in renamed.items() if old != new}
            return expression.xreplace(changed) if changed else expression
    return expression


def given_numbers(expression: Any, like: Any) -> dict[Any, int]:
    """The symbols of an expression that are integers a program was given, with their values now.

    Sizes of tensors are none: a graph per length would be one too many, one per window is not.
    like: sizes, one of which may know the shape environment.
    """
    from torch._dynamo.source import TensorPropertySource  # loaded long before, but in Dynamo only

    found: dict[Any, int] = {}
    env = next((size.node.shape_env for size in like if isinstance(size, torch.SymInt)), None)
    if env is None:
        return found
    for symbol in expression.free_symbols:
        sources = env.var_to_sources.get(symbol, ())
        value = env.backed_var_to_val.get(symbol)
        of_sizes = any(isinstance(source, TensorPropertySource) for source in sources)
        if sources and value is not None and not of_sizes:
            found[symbol] = int(value)
    return found
