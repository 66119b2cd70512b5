"""What every pattern is made of: the base class, the registry, its op, and checks of its fields.

A pattern is one file of the folder above: a frozen dataclass with its parameters, `estimate` (which
keys matter on this input), `select` (the same set, cell by cell: the truth), `cost` (sympy) and a
`main` that draws it. Registering it defines its op, whose arguments are the dataclass's fields.
"""

from mpass.patterns.base.checks import check_positive
from mpass.patterns.base.op import head_slots, index_op, patterns_of, shared_slots
from mpass.patterns.base.pattern import HEAD_DIM, LENGTH, Pattern, causal_keys
from mpass.patterns.base.registry import (
    ENTRY_POINTS,
    find_pattern,
    register_pattern,
    registered_patterns,
)

__all__ = [
    "ENTRY_POINTS",
    "HEAD_DIM",
    "LENGTH",
    "Pattern",
    "causal_keys",
    "check_positive",
    "find_pattern",
    "head_slots",
    "index_op",
    "patterns_of",
    "register_pattern",
    "registered_patterns",
    "shared_slots",
]
