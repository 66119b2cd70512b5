"""What every pattern is made of: the base class, the registry, its op, and checks of its fields.

A pattern is one file of the folder above: a frozen dataclass with its parameters, `estimate` (which
keys matter on this input), `select` (the same set, cell by cell: the truth) and `cost` (sympy).
What tools need to know of it (the sizes that a calibration tries, what a benchmark sweeps, advice
in words) are methods of the class, too, all of which may be left out. Registering it defines its
op, whose arguments are the dataclass's fields.
"""

from mpass.patterns.base.checks import check_positive, check_types
from mpass.patterns.base.layer import (
    HeadGroups,
    attend_heads,
    attend_heads_lse,
    group_heads,
    groups_of,
)
from mpass.patterns.base.masked_attention import patterns_as_text
from mpass.patterns.base.op import head_slots, index_op, named_op, patterns_of, shared_slots
from mpass.patterns.base.parameters import parameter_kinds, take_parameter
from mpass.patterns.base.pattern import HEAD_DIM, LENGTH, Lost, Pattern, between, causal_keys
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
    "HeadGroups",
    "Lost",
    "Pattern",
    "attend_heads",
    "attend_heads_lse",
    "between",
    "causal_keys",
    "check_positive",
    "check_types",
    "find_pattern",
    "group_heads",
    "groups_of",
    "head_slots",
    "index_op",
    "named_op",
    "parameter_kinds",
    "patterns_as_text",
    "patterns_of",
    "register_pattern",
    "registered_patterns",
    "shared_slots",
    "take_parameter",
]
