"""Checks of a pattern's fields: each raises PatternValueError and says what is allowed."""

from __future__ import annotations

import dataclasses

from mpass.errors import PatternValueError
from mpass.lowering.index import BLOCK
from mpass.patterns.base.parameters import take_parameter
from mpass.patterns.base.pattern import Pattern


def check_types(pattern: Pattern) -> None:
    """Raise PatternValueError unless every field has a value of its type, or of its Literal."""
    for name, value in pattern.parameters().items():
        take_parameter(type(pattern), pattern.name, name, value)


def check_positive(pattern: Pattern, **allow_zero: bool) -> None:
    """Raise PatternValueError unless the int fields are positive (or zero where allowed)."""
    for field in dataclasses.fields(pattern):
        value = getattr(pattern, field.name)
        # Dynamo traces this where a model makes a pattern: annotations are only compared.
        if not (field.type is int or field.type == "int"):
            continue
        lowest = 0 if allow_zero.get(field.name) else 1
        if isinstance(value, bool) or not isinstance(value, int) or value < lowest:
            raise PatternValueError(pattern.name, field.name, value, f"an int >= {lowest}")


def forced_blocks(pattern: Pattern) -> int:
    """Blocks of BLOCK keys that are kept whatever their scores: the first and the nearest ones."""
    kept = getattr(pattern, "sink_blocks", 0) + getattr(pattern, "local_blocks", 1)
    return int(kept * getattr(pattern, "block_size", BLOCK)) // BLOCK


def check_blocks(pattern: Pattern) -> None:
    """Raise PatternValueError unless numbers of blocks are in range and the forced ones have room.

    Fields: sink_blocks, last_blocks and columns may be 0; block_size is a multiple of BLOCK.
    """
    check_positive(pattern, sink_blocks=True, last_blocks=True, columns=True, at_length=True)
    if hasattr(pattern, "block_size"):
        check_multiple(pattern, "block_size")
    check_room(pattern, forced_blocks(pattern), int(pattern.parameters()["max_blocks"]))


def check_share(pattern: Pattern, *fields: str) -> None:
    """Raise PatternValueError unless these fields are numbers above 0 and up to 1."""
    for field in fields:
        value = getattr(pattern, field)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise PatternValueError(pattern.name, field, value, "a share, above 0 and up to 1")


def check_multiple(pattern: Pattern, field: str) -> None:
    """Raise PatternValueError unless the field is a multiple of BLOCK."""
    value = getattr(pattern, field)
    if value % BLOCK:
        raise PatternValueError(pattern.name, field, value, f"a multiple of {BLOCK}")


def check_divisor(pattern: Pattern, *fields: str) -> None:
    """Raise PatternValueError unless these fields divide BLOCK."""
    for field in fields:
        value = getattr(pattern, field)
        if BLOCK % value:
            raise PatternValueError(pattern.name, field, value, f"a divisor of {BLOCK}")


def check_per(pattern: Pattern) -> None:
    """Raise PatternValueError unless a selection is per query head or per kv head."""
    value = pattern.parameters()["per"]
    if value not in ("head", "kv_head"):
        raise PatternValueError(pattern.name, "per", value, "'head' or 'kv_head'")


def check_room(pattern: Pattern, forced_blocks: float, max_blocks: float) -> None:
    """Raise PatternValueError unless the blocks that are always kept fit into the lists."""
    if max_blocks < forced_blocks:
        allowed = f"{forced_blocks} or more, to hold the first and nearest blocks"
        raise PatternValueError(pattern.name, "max_blocks", max_blocks, allowed)
