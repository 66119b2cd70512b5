"""The C++ source of a KernelSpec: a generated `spec.h` in front of the plain headers of kernels/.

The headers include one another as any C++ does, so that language servers and clang-format work on
them. Here they are joined into one translation unit, which is what is compiled, shown and cached.
"""

from __future__ import annotations

import ctypes
import functools
import re
from pathlib import Path

from mpass.lowering.cpu.arguments import (
    LIST_KERNELS,
    AttentionArguments,
    BackwardArguments,
    EstimateArguments,
    LinearArguments,
    QuantizeArguments,
    RowLossArguments,
    c_fields,
    list_c_fields,
)
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.index import ALL_BLOCKS, BLOCK
from mpass.lowering.reference import vertical_slash

KERNELS = Path(__file__).parent / "kernels"

EXAMPLE_SPEC = KernelSpec("bfloat16", 128, 128, "avx512_bf16", kernel="union")
"""The spec of kernels/spec.h, which is there for language servers; no kernel is built from it."""

SYSTEM_INCLUDE = re.compile(r"#include (<[^>]+>)")
OWN_INCLUDE = re.compile(r'#include (?:"([^"]+)"|([A-Z0-9_]+_HEADER))')

Fields = list[tuple[str, str]]

STRUCTURES: dict[str, type[ctypes.Structure]] = {
    "attention": AttentionArguments,
    "quantize_rows": QuantizeArguments,
    "linear_half": LinearArguments,
}
"""What a kernel is called with that is no estimator."""

BESIDE: dict[str, type[ctypes.Structure]] = {
    "attention_backward": BackwardArguments,
    "row_losses": RowLossArguments,
}
"""What a kernel is called with beside the arguments of the attention."""


def generate_source(spec: KernelSpec) -> str:
    """The C++ translation unit of a spec; its text keys the cache of compiled libraries."""
    return join_headers(spec.kernel_header, generate_spec_header(spec), spec.headers)


def generate_spec_header(spec: KernelSpec) -> str:
    """The text of `spec.h`: all that the headers in kernels/ know of a spec."""
    if spec.attends:
        structures = {"AttentionArguments": argument_fields("attention")}
        if spec.kernel in BESIDE:
            more = BESIDE[spec.kernel]
            structures[more.__name__] = c_fields(more)
    else:
        structure = STRUCTURES.get(spec.kernel, EstimateArguments).__name__
        structures = {structure: argument_fields(spec.kernel)}
    return spec_header_text(spec, f"Generated for: {spec}.", structures)


def generate_example_header() -> str:
    """The text of kernels/spec.h, with the arguments of every kernel: so every header parses."""
    estimators: dict[str, str] = {}
    for kernel in ("fixed_budget", *LIST_KERNELS):
        for name, kind in argument_fields(kernel):
            if estimators.setdefault(name, kind) != kind:
                raise TypeError(f"{name} is {estimators[name]} and {kind}")
    structures = {
        "AttentionArguments": argument_fields("attention"),
        "QuantizeArguments": argument_fields("quantize_rows"),
        "LinearArguments": argument_fields("linear_half"),
        **{more.__name__: c_fields(more) for more in BESIDE.values()},
        "EstimateArguments": list(estimators.items()),
    }
    title = "An example for language servers: the real one is generated (lowering/cpu/source.py)."
    return spec_header_text(EXAMPLE_SPEC, title, structures)


def argument_fields(kernel: str) -> Fields:
    """Name and C++ type of every field of the structure that a kernel is called with."""
    if kernel in LIST_KERNELS:
        return list_c_fields(kernel)
    return c_fields(STRUCTURES.get(kernel, EstimateArguments))


def spec_header_text(spec: KernelSpec, title: str, structures: dict[str, Fields]) -> str:
    headers = "\n".join(f'#define {macro} "{name}"' for macro, name in spec.headers.items())
    arguments = "\n".join(structure_text(*structure) for structure in structures.items())
    return f"""\
// mpass CPU kernels. {title}
#pragma once

#include <cstdint>

// The headers of the instruction set, and whether products are of bf16 pairs.
{headers}
#define USES_BF16 {int(spec.bf16)}

namespace {{

struct float32_tag {{}};
struct bfloat16_tag {{}};
struct float16_tag {{}};
using input = {"float" if spec.input == "float32" else "uint16_t"};
using input_tag = {spec.input}_tag;
using packed = {"uint16_t" if spec.bf16 else "float"};  // element of packed K and V
using packed_tag = {spec.packed}_tag;
using word = {"uint32_t" if spec.bf16 else "float"};  // what the micro-GEMM broadcasts
using weight = {"float" if spec.weight == "float32" else "uint16_t"};  // element of P
using weight_tag = {spec.weight}_tag;
constexpr int PAIR = {2 if spec.bf16 else 1};  // packed elements per word
constexpr bool INPUT_IS_PACKED = {cpp_bool(spec.input == spec.packed)};

constexpr int HEAD_DIM = {spec.head_dim}, VALUE_DIM = {spec.value_dim};
constexpr int DEPTH = {spec.depth};  // words of a packed row of queries or keys
constexpr int INT8_DEPTH = {spec.int8_depth};  // words of four 8-bit numbers of such a row
constexpr int VALUE_WIDTH = {spec.value_width};  // floats of an output row with its padding
constexpr int BLOCK = {BLOCK};  // positions per block of queries and of keys
constexpr int STRIP = {spec.strip};  // tiles per softmax update
constexpr bool SOFTCAP = {cpp_bool(spec.softcap)};
constexpr bool INT8_SCORES = {cpp_bool(spec.int8)};  // scores of attention are
constexpr bool HALF_VALUES = {cpp_bool(spec.halves)};  // P x V is in fp16
constexpr bool SUMS_DISTANCES = {cpp_bool(spec.sums_distances)};
constexpr bool BIASED = {cpp_bool(spec.biased)};  // by distance

constexpr int32_t ALL_BLOCKS = {ALL_BLOCKS};  // lowering/index.py
constexpr int LAST_QUERIES = {vertical_slash.LAST_QUERIES};
constexpr int64_t SINK_COLUMNS = {vertical_slash.SINK_COLUMNS};
constexpr int64_t LOCAL_DIAGONALS = {vertical_slash.LOCAL_DIAGONALS};

{arguments}
}}  // namespace
"""


def structure_text(name: str, fields: Fields) -> str:
    lines = "".join(f"  {kind} {field};\n" for field, kind in fields)
    comment = "// The numbers of a call: field by field the ctypes structure of the caller."
    return f"{comment}\nstruct {name} {{\n{lines}}};\n"


def cpp_bool(value: bool) -> str:
    return "true" if value else "false"


def join_headers(entry: str, spec_header: str, macros: dict[str, str]) -> str:
    """One text of a header and all that it includes, each once, standard headers in front.

    macros: which header stands for an include by macro.
    """
    system: set[str] = set()
    joined: set[str] = set()
    parts: list[str] = []

    def visit(name: str, text: str) -> None:
        joined.add(name)
        kept = []
        for line in text.splitlines():
            if own := OWN_INCLUDE.fullmatch(line):
                included = own[1] or macros[own[2]]
                if included not in joined:
                    visit(included, read_header(included))
            elif standard := SYSTEM_INCLUDE.fullmatch(line):
                system.add(standard[1])
            elif line != "#pragma once":
                kept.append(line)
        parts.append(f"// ---- {name}\n" + "\n".join(kept))

    visit("spec.h", spec_header)
    visit(entry, read_header(entry))
    includes = "\n".join(f"#include {name}" for name in sorted(system))
    text = "\n\n".join([includes, *parts])
    return re.sub(r"\n{3,}", "\n\n", text) + "\n"


@functools.cache
def read_header(name: str) -> str:
    return (KERNELS / name).read_text("utf-8")
