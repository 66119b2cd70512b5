"""Lists of key blocks from pooled keys by generated C++; the meaning is lowering.estimate_union."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch
from mpass.lowering.cpu.arguments import (
    c_fields,
    fields,
    pointer,
    rows_contiguous,
    strided,
    strides,
)
from mpass.lowering.cpu.library import compile_source
from mpass.lowering.cpu.spec import EXP2_FP32, KernelSpec, environment
from mpass.lowering.cpu.support import estimate_spec
from mpass.lowering.estimate import LAST_QUERIES
from mpass.lowering.estimate_union import UnionRule, union_width
from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    SparseIndex,
    empty_index,
    list_slots,
    num_query_blocks,
)
from torch import Tensor

WHOLE_NUMBERS = "columns sink_blocks local_blocks last_blocks rows pool max_blocks"
"""Parameters of a UnionRule that are int32 [num_heads] of a call."""


POINTER_TYPES = {
    **dict.fromkeys(("mass", "row_share"), "const float*"),
    **dict.fromkeys(("block_count", "block_index", "column_count", "column_index"), "int32_t*"),
}


class PooledArguments(ctypes.Structure):
    """A call of `union_index`: parameters are arrays with one entry per head of `heads`."""

    _fields_: ClassVar = [
        *fields(ctypes.c_void_p, f"query key key_mask heads mass row_share {WHOLE_NUMBERS}"),
        *fields(ctypes.c_void_p, "block_count block_index column_count column_index"),
        *fields(ctypes.c_int64, "batch num_heads group num_queries num_keys num_blocks"),
        *strided("query", "key"),
        *fields(ctypes.c_int64, "list_width column_width query_offset window causal threads"),
        *fields(ctypes.c_float, "scale"),
    ]


def union_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[UnionRule],
    *,
    scale: float,
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """As `mpass.lowering.estimate_union.union_index`, by one call of a generated library.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; rules: one per head. spec: a specialisation to use.
    Raises MemoryError if the means do not fit.
    """
    num_blocks = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, num_blocks, union_width(rules), list_slots(len(heads)))
    query, key = rows_contiguous(query), rows_contiguous(key)
    key_mask = None if mask.key_mask is None else mask.key_mask.contiguous().view(torch.uint8)
    names = WHOLE_NUMBERS.split()
    numbers = torch.tensor(
        [list(heads), *([getattr(rule, name) for rule in rules] for name in names)],
        dtype=torch.int32,
    )
    shares = torch.tensor([[r.mass for r in rules], [r.row_share for r in rules]])
    if query.shape[0] == 0 or not heads or 0 in (query.shape[2], key.shape[2]):
        return index
    arguments = PooledArguments(
        query=pointer(query),
        key=pointer(key),
        key_mask=pointer(key_mask),
        heads=pointer(numbers[0]),
        mass=pointer(shares[0]),
        row_share=pointer(shares[1]),
        block_count=pointer(index.block_count),
        block_index=pointer(index.block_index),
        column_count=pointer(index.column_count),
        column_index=pointer(index.column_index),
        batch=query.shape[0],
        num_heads=len(heads),
        group=query.shape[1] // key.shape[1],
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        num_blocks=num_blocks,
        list_width=index.block_index.shape[-1],
        column_width=index.column_index.shape[-1],
        query_offset=mask.query_offset,
        window=mask.window,
        causal=mask.causal,
        threads=torch.get_num_threads(),
        scale=scale,
        **{name: pointer(row) for name, row in zip(names, numbers[1:], strict=True)},
        **strides("query", query),
        **strides("key", key),
    )
    library = load_pooled(replace(spec or estimate_spec(query), kernel="pooled"))
    if library.union_index(ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory to estimate an index over keys {tuple(key.shape)}")
    return index


@functools.cache
def load_pooled(spec: KernelSpec) -> ctypes.CDLL:
    """The compiled library of a spec: from memory, the disk cache, or the compiler."""
    return compile_source(generate_pooled_source(spec), label=str(spec))


def generate_pooled_source(spec: KernelSpec) -> str:
    """The C++ translation unit of a spec; its text keys the cache of compiled libraries."""
    typed = [(name, POINTER_TYPES.get(name, kind)) for name, kind in c_fields(PooledArguments)]
    template = environment().get_template("kernel.cpp.jinja")
    return template.render(
        spec=spec, block=BLOCK, exp2=EXP2_FP32, arguments=typed, last_queries=LAST_QUERIES
    )
