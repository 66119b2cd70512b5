"""Compiled libraries: KernelSpec -> source -> shared object -> a call by raw pointers.

Compiling, the disk cache (keyed by source and flags) and locks between processes are Inductor's.
"""

from __future__ import annotations

import ctypes
import functools
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import ClassVar

from mpass.lowering.cpu.spec import KernelSpec, generate_source

PROGRESS_AFTER = 3.0
"""Seconds of compiling after which a line on stderr says so."""

EXTRA_FLAGS = ("-fno-strict-aliasing",)  # packed bf16 are read as 32-bit pairs


class Arguments(ctypes.Structure):
    """The numbers of one call; the generated source declares the same structure from these fields.

    Strides are in elements. A null pointer stands for a tensor that there is not.
    """

    _fields_: ClassVar = [
        *((name, ctypes.c_void_p) for name in ("query", "key", "value", "out")),
        *((name, ctypes.c_void_p) for name in ("key_mask", "sinks")),
        *((name, ctypes.c_void_p) for name in ("block_count", "block_index")),
        *((name, ctypes.c_void_p) for name in ("diagonal_count", "diagonal_index")),
        *((name, ctypes.c_void_p) for name in ("column_count", "column_index", "head_slots")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "kv_heads")),
        *((name, ctypes.c_int64) for name in ("num_queries", "num_keys", "num_blocks")),
        *((name, ctypes.c_int64) for name in ("query_batch", "query_head", "query_row")),
        *((name, ctypes.c_int64) for name in ("key_batch", "key_head", "key_row")),
        *((name, ctypes.c_int64) for name in ("value_batch", "value_head", "value_row")),
        *((name, ctypes.c_int64) for name in ("out_batch", "out_head", "out_row")),
        *((name, ctypes.c_int64) for name in ("num_lists", "max_blocks")),
        *((name, ctypes.c_int64) for name in ("num_diagonals", "max_diagonals")),
        *((name, ctypes.c_int64) for name in ("max_columns", "longest_columns")),
        *((name, ctypes.c_int64) for name in ("query_offset", "window", "causal", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    ]

    @classmethod
    def c_fields(cls) -> list[tuple[str, str]]:
        """Name and C++ type of every field."""
        pointers = {"query": "const void*", "key": "const void*", "value": "const void*"}
        pointers |= {"out": "void*", "key_mask": "const uint8_t*", "sinks": "const float*"}
        numbers = {ctypes.c_int64: "int64_t", ctypes.c_float: "float"}
        return [
            (name, pointers.get(name) or numbers.get(kind, "const int32_t*"))
            for name, kind in cls._fields_
        ]


@functools.cache
def load_library(spec: KernelSpec) -> ctypes.CDLL:
    """The compiled library of a spec: from memory, Inductor's disk cache, or the compiler."""
    return compile_source(generate_source(spec), label=str(spec))


def compile_source(source: str, *, label: str, extra_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile and load one translation unit with OpenMP, through Inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    timer = threading.Timer(PROGRESS_AFTER, report_progress, [label])
    timer.daemon = True
    timer.start()
    try:
        library: ctypes.CDLL = CppCodeCache.load(
            source, needs_vec_isa=False, extra_flags=(*EXTRA_FLAGS, *extra_flags)
        )
    finally:
        timer.cancel()
    return library


def report_progress(label: str) -> None:
    print(f"mpass: compiling CPU kernels ({label})", file=sys.stderr, flush=True)


def warm_up(specs: Sequence[KernelSpec]) -> None:
    """Compile several libraries at once: the compiler is a process, so threads are enough."""
    if specs:
        with ThreadPoolExecutor(max_workers=len(specs)) as pool:
            list(pool.map(load_library, specs))
