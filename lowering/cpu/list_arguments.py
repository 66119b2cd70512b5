"""The numbers of one call of an estimator of rules, as the generated source declares likewise.

Each kernel takes the fields of its rule, one array per field with an entry per head.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any

from mpass.lowering.cpu.arguments import NUMBER_TYPES, fields, strided
from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.lowering.reference.flex_prefill import FlexPrefillRule
from mpass.lowering.reference.sample_attention import ColumnRule
from mpass.lowering.reference.union import VerticalBlockRule
from mpass.lowering.reference.x_attention import XAttentionRule

LIST_KERNELS: dict[str, type[Any]] = {
    "union": VerticalBlockRule,
    "block_scores": BlockScoresRule,
    "x_attention": XAttentionRule,
    "flex_prefill": FlexPrefillRule,
    "sample_attention": ColumnRule,
}
"""Rule of each kernel; its source is kernels/<kernel>.h."""

OUTPUTS = ("block_count", "block_index", "column_count", "column_index")


@functools.cache
def list_arguments(kernel: str) -> type[ctypes.Structure]:
    """The structure of a call of that kernel."""

    class ListArguments(ctypes.Structure):
        _fields_ = (
            *fields(ctypes.c_void_p, "query key key_mask heads"),
            *fields(ctypes.c_void_p, " ".join(rule_fields(kernel))),
            *fields(ctypes.c_void_p, " ".join(OUTPUTS)),
            *fields(ctypes.c_int64, "batch num_heads group num_queries num_keys num_blocks"),
            *strided("query", "key"),
            *fields(ctypes.c_int64, "list_width column_width query_offset window causal threads"),
            *fields(ctypes.c_float, "scale"),
        )

    return ListArguments


def rule_fields(kernel: str) -> dict[str, str]:
    """Names and C types of the parameters of a kernel; a number that may be None is 0 then."""
    return {
        field.name: "float" if str(field.type).startswith("float") else "int32_t"
        for field in dataclasses.fields(LIST_KERNELS[kernel])
    }


def list_c_fields(kernel: str) -> list[tuple[str, str]]:
    """Name and C++ type of every field of `list_arguments`."""
    types = {name: f"const {kind}*" for name, kind in rule_fields(kernel).items()}
    types |= dict.fromkeys(OUTPUTS, "int32_t*") | {"heads": "const int32_t*"}
    types |= {"query": "const void*", "key": "const void*", "key_mask": "const uint8_t*"}
    return [
        (name, NUMBER_TYPES.get(kind) or types[name])
        for name, kind, *_ in list_arguments(kernel)._fields_
    ]
