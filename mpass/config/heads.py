"""The patterns of a layer's heads as an engine names them in every call, read once.

Dynamo traces none of it: it takes what is read as constants, by names that it has to guard on.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch

from mpass.config.layer import PatternLike, as_pattern
from mpass.errors import ShapeError
from mpass.patterns.base import HeadGroups, Pattern, group_heads

CONSTANT = "_dynamo_marked_constant"
"""What torch.compiler.assume_constant_result sets; that one would import Dynamo, for seconds."""


def heads_of(
    patterns: PatternLike | Sequence[PatternLike],
    num_heads: int,
    layer: int = -1,
    *,
    kv_group: int = 1,
) -> HeadGroups:
    """The heads of a layer by their patterns: one pattern for all, or a sequence with one per head.

    kv_group: query heads per kv head.
    Raises ShapeError for another number of patterns than of heads, and the errors of `as_pattern`.
    """
    if isinstance(patterns, Pattern | str):
        # Not `(patterns,) * num_heads`: a number of heads may be symbolic while Dynamo traces.
        own: tuple[PatternLike, ...] = tuple([patterns for _ in range(num_heads)])
    elif isinstance(patterns, Sequence):
        own = tuple(patterns)
    else:
        own = (as_pattern(patterns),)
    if len(own) != num_heads:
        where = "" if layer < 0 else f"layer {layer}: "
        raise ShapeError(
            f"{where}{len(own)} patterns for {num_heads} query heads; "
            "give one per query head, or one pattern for all"
        )
    if torch.compiler.is_compiling():
        # A number where Dynamo traces the sizes as symbols; torch 2.11 repeats no tuple by one.
        group = len([None for _ in range(kv_group)])
        return constant_groups(group, *(as_text(pattern) for pattern in own))
    for pattern in own:
        if not isinstance(pattern, Pattern | str):
            as_pattern(pattern)  # says what is wrong
    return read_groups(own, kv_group)


@functools.lru_cache(maxsize=1024)
def read_groups(patterns: tuple[PatternLike, ...], kv_group: int) -> HeadGroups:
    """The heads of a layer by their patterns, one per head."""
    return group_heads([as_pattern(pattern) for pattern in patterns], kv_group)


def constant_groups(kv_group: int, *texts: str) -> HeadGroups:
    """`read_groups` of texts."""
    return read_groups(texts, kv_group)


def as_text(pattern: PatternLike) -> str:
    """A pattern as text that `as_pattern` reads."""
    return str(as_pattern(pattern))


for _function in (constant_groups, as_text):
    _function.__dict__[CONSTANT] = True
