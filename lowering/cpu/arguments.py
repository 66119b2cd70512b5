"""The numbers of one call, as ctypes structures that the generated source declares likewise.

Strides are in elements. A null pointer stands for a tensor that there is not.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
from typing import Any, ClassVar

from torch import Tensor

from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.lowering.reference.flex_prefill import FlexPrefillRule
from mpass.lowering.reference.sample_attention import ColumnRule
from mpass.lowering.reference.union import VerticalBlockRule
from mpass.lowering.reference.x_attention import XAttentionRule

CONST_VOID = ("query", "key", "value", "grad_out")
POINTER_TYPES = {
    **dict.fromkeys(CONST_VOID, "const void*"),
    "out": "void*",
    "lse": "float*",
    **dict.fromkeys(("rows", "weight"), "const void*"),
    "bias": "const float*",
    "levels": "uint8_t*",
    "steps": "float*",
    "dots": "const float*",
    **dict.fromkeys(("lost", "exact"), "float*"),
    **dict.fromkeys(("distance_bias", "run_bias", "turned_bias"), "const float*"),
    "grad_bias": "float*",
    "positions": "const int64_t*",
    **dict.fromkeys(("grad_query", "grad_key", "grad_value"), "void*"),
    "key_mask": "const uint8_t*",
    "sinks": "const float*",
    **dict.fromkeys(("first_count", "first_index", "second_count", "second_index"), "int32_t*"),
}
NUMBER_TYPES = {ctypes.c_int64: "int64_t", ctypes.c_float: "float"}


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    return [(name, kind) for name in names.split()]


def strided(*names: str) -> list[tuple[str, type]]:
    return [(f"{name}_{dim}", ctypes.c_int64) for name in names for dim in ("batch", "head", "row")]


def c_fields(structure: type[ctypes.Structure]) -> list[tuple[str, str]]:
    """Name and C++ type of every field; pointers without a type of their own are to int32."""
    return [
        (name, NUMBER_TYPES.get(kind) or POINTER_TYPES.get(name, "const int32_t*"))
        for name, kind, *_ in structure._fields_
    ]


class AttentionArguments(ctypes.Structure):
    """A call of `sparse_attention`; the index's tensors as in SparseIndex.

    distance_bias: lines of a bias by distance, fp32, `bias_head` numbers apart, 0 for one of all
    heads; each may be read a block beyond its end.
    """

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, "query key value out lse key_mask sinks block_count block_index"),
        *fields(ctypes.c_void_p, "diagonal_count diagonal_index column_count column_index"),
        *fields(ctypes.c_void_p, "head_slots distance_bias"),
        *fields(ctypes.c_int64, "batch heads kv_heads num_queries num_keys num_blocks"),
        *strided("query", "key", "value", "out"),
        *fields(ctypes.c_int64, "num_lists max_blocks num_diagonals max_diagonals max_columns"),
        *fields(ctypes.c_int64, "longest_columns query_offset window causal threads bias_head"),
        *fields(ctypes.c_float, "scale softcap"),
    ]


class QuantizeArguments(ctypes.Structure):
    """A call of `quantize_rows`: num_rows rows of `groups` groups of channels."""

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, "rows levels steps"),
        *fields(ctypes.c_int64, "num_rows groups stride threads"),
    ]


class LinearArguments(ctypes.Structure):
    """A call of `linear_half`: num_rows rows of `inputs` numbers, a weight [outputs, inputs].

    bias: fp32 [outputs] or null; out: contiguous [num_rows, outputs].
    """

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, "rows weight bias out"),
        *fields(ctypes.c_int64, "num_rows inputs outputs rows_stride weight_stride threads"),
    ]


class BackwardArguments(ctypes.Structure):
    """What a call of `attention_backward` takes beside the arguments of the forward pass.

    dots: of each row the sum of out * grad_out, fp32 [B, H, Nq]; gradients of query, key and value
    are contiguous; parts: units per kv head, see kernels/attention_backward.h. turned_bias: lines
    of a bias by distance from the last distance to the first, as far apart as `bias_head` says;
    grad_bias: sums of their gradients, fp32 [B, Hk, parts, H / Hk, line], zeros; null for none.
    """

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, "grad_out dots grad_query grad_key grad_value"),
        *fields(ctypes.c_void_p, "turned_bias grad_bias"),
        *strided("grad_out"),
        *fields(ctypes.c_int64, "parts line"),
    ]


class RowLossArguments(ctypes.Structure):
    """What a call of `row_losses` takes beside the arguments of the attention.

    positions: `count` rows of the queries, int64, ascending; lost: fp32 [B, H, count]; exact: fp32
    [B, H, count, Dv], null where nobody asks.
    """

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, "positions lost exact"),
        *fields(ctypes.c_int64, "count"),
    ]


class EstimateArguments(ctypes.Structure):
    """A call of an estimator.

    heads: the query heads, int32 [num_heads]. first and second are what a pattern looks for:
    vertical-slash columns and block diagonals (sizes: budgets); block top-k blocks and nothing
    (first_sizes: top_k, second_sizes: positions per pooled block). distance_bias: a line of each of
    `heads`, fp32 [num_heads, bias_head], which may be read a block beyond its end; run_bias: what
    it is of runs of keys, [num_heads, run_head]; null where there is no bias.
    """

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, "query key key_mask heads first_sizes second_sizes"),
        *fields(ctypes.c_void_p, "first_count first_index second_count second_index"),
        *fields(ctypes.c_void_p, "distance_bias run_bias"),
        *fields(ctypes.c_int64, "batch num_heads group kv_heads num_queries num_keys num_blocks"),
        *strided("query", "key"),
        *fields(ctypes.c_int64, "first_width second_width query_offset window causal threads"),
        *fields(ctypes.c_int64, "bias_head run_head"),
        *fields(ctypes.c_float, "scale"),
    ]


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
    """The structure of a call of an estimator of rules: an array per field, an entry per head."""

    class ListArguments(ctypes.Structure):
        _fields_ = (
            *fields(ctypes.c_void_p, "query key key_mask heads distance_bias run_bias"),
            *fields(ctypes.c_void_p, " ".join(rule_fields(kernel))),
            *fields(ctypes.c_void_p, " ".join(OUTPUTS)),
            *fields(ctypes.c_int64, "batch num_heads group num_queries num_keys num_blocks"),
            *strided("query", "key"),
            *fields(ctypes.c_int64, "list_width column_width query_offset window causal threads"),
            *fields(ctypes.c_int64, "bias_head run_head"),
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
    types |= dict.fromkeys(("distance_bias", "run_bias"), "const float*")
    return [
        (name, NUMBER_TYPES.get(kind) or types[name])
        for name, kind, *_ in list_arguments(kernel)._fields_
    ]


def rows_contiguous(tensor: Tensor) -> Tensor:
    """The tensor itself if its rows are contiguous, else a contiguous copy."""
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """The stride fields of a tensor [B, H, N, D]."""
    batch, head, row, _ = tensor.stride()
    return {f"{name}_batch": batch, f"{name}_head": head, f"{name}_row": row}


def pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
