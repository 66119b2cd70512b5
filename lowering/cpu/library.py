"""Compiled libraries: KernelSpec -> source -> shared object -> a call by raw pointers.

Compiling, the disk cache (keyed by source and flags) and locks between processes are Inductor's.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import inspect
import threading
from collections.abc import Sequence

from mpass.lowering.activity import activity
from mpass.lowering.cpu.source import generate_source
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.kernel_sources import KernelSource, announce_source

EXTRA_FLAGS = ("-fno-strict-aliasing",)  # packed bf16 are read as 32-bit pairs

PROBE_SOURCE = """#include <immintrin.h>
#include <omp.h>
#include <cstdint>
extern "C" int32_t mpass_probe() {
  int32_t threads = 0;
#pragma omp parallel reduction(+ : threads)
  threads += 1;
  return threads;
}
"""
"""What every generated source needs of a compiler."""

INSTRUCTION_FLAGS = {
    "amx": ("-mamx-tile", "-mamx-bf16", "-mamx-int8", "-mavx512bf16", "-mavx512vnni"),
    "avx512_bf16": ("-mavx512bf16", "-mavx512vnni"),
    "avx512_fp16": ("-mavx512fp16",),
}
"""On top of -march=native, for compilers that do not know the machine."""


def instruction_flags(spec: KernelSpec) -> tuple[str, ...]:
    """The flags by which a compiler knows the instructions of a spec."""
    more = tuple(f"-m{name}" for name in spec.extensions)
    return (*INSTRUCTION_FLAGS.get(spec.instruction_set, ()), *more)


@functools.cache
def load_library(spec: KernelSpec) -> ctypes.CDLL:
    """The compiled library of a spec: from memory, Inductor's disk cache, or the compiler."""
    flags = instruction_flags(spec)
    source = generate_source(spec)
    # A warm-up may be at it: then the compiler is not started again.
    with build_lock(spec), activity().build(str(spec)):
        library = compile_source(source, extra_flags=flags)
    announce_source(describe_source(spec, source, library._name))
    return library


@functools.cache
def build_lock(spec: KernelSpec) -> threading.Lock:
    """Held while a spec is compiled."""
    return threading.Lock()


@functools.cache
def compiler_fault(instruction_set: str, extension: str = "") -> str:
    """Why the C++ compiler here makes no library for an instruction set; "" if it does.

    extension: more instructions that it has to know, as it calls them.

    Compiles a few lines once per machine: whether a compiler is there, knows the instructions,
    finds OpenMP and gives a library that loads shows in no other way.
    """
    flags = INSTRUCTION_FLAGS.get(instruction_set, ())
    if extension:
        flags = (*flags, f"-m{extension}")
    try:
        library = compile_source(PROBE_SOURCE, extra_flags=flags)
        return (
            "" if library.mpass_probe() > 0 else "no C++ compiler with a working OpenMP was found"
        )
    except Exception as error:
        if type(error).__name__ == "InvalidCxxCompiler":
            return "no C++ compiler was found"
        lines = [line.strip() for line in str(error).splitlines() if "error" in line.lower()]
        detail = lines[-1] if lines else type(error).__name__
        return f"the C++ compiler failed ({detail[:200]})"


def describe_source(spec: KernelSpec, source: str, path: str) -> KernelSource:
    """The generated source as debug folders and pages show it."""
    digest = hashlib.sha256(source.encode()).hexdigest()[:8]
    name = f"cpu_{spec.kernel}_{spec.input}_{spec.head_dim}_{digest}"
    return KernelSource(name, "cpp", source, (("made for", str(spec)), ("library", path)), spec)


def compile_command(spec: KernelSpec) -> str:
    """The compiler and its flags for a spec, without include and library folders."""
    from torch._inductor.cpp_builder import CppTorchDeviceOptions, get_cpp_compiler
    from torch._inductor.cpu_vec_isa import invalid_vec_isa

    flags = (*EXTRA_FLAGS, *instruction_flags(spec))
    options = CppTorchDeviceOptions(
        vec_isa=invalid_vec_isa, device_type="cpu", extra_flags=list(flags)
    )
    given = dict.fromkeys(f"-{flag}" for flag in options.get_cflags())
    passed = dict.fromkeys(options.get_passthrough_args())
    return " ".join([get_cpp_compiler(), *given, *passed])


def compile_source(source: str, *, extra_flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Compile and load one translation unit with OpenMP, through Inductor's cache."""
    from torch._inductor.codecache import CppCodeCache

    # torch 2.11 has no such option: it adds vector flags of its own, which only cost a probe.
    known = inspect.signature(CppCodeCache.load_async).parameters
    options = {"needs_vec_isa": False} if "needs_vec_isa" in known else {}
    library: ctypes.CDLL = CppCodeCache.load(
        source, extra_flags=(*EXTRA_FLAGS, *extra_flags), **options
    )
    return library
