"""The generated C++ itself: readable, the same text for the same spec, and right under AMX too."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from mpass.lowering.cpu import estimators, library, source
from mpass.lowering.cpu.arguments import LIST_KERNELS
from mpass.lowering.cpu.attention import run_attention
from mpass.lowering.cpu.linear_half import half_spec
from mpass.lowering.cpu.source import KERNELS, generate_source, generate_spec_header
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import instruction_sets
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.vertical_slash import VerticalSlashRule, vertical_slash_index
from tests.helpers.cpu_cases import (
    assert_same_index,
    estimating_with,
    needs_kernels,
    random_index,
    random_inputs,
)
from tests.helpers.golden import assert_golden

GOLDEN = Path(__file__).parent / "golden"
SOURCES = {
    "attention_bf16_amx.cpp": KernelSpec("bfloat16", 128, 128, "amx"),
    "union_bf16_avx512.cpp": KernelSpec("bfloat16", 64, 64, "avx512_bf16", kernel="union"),
}
"""Whole kernels that are looked at: together they hold most of the headers."""

SPEC_HEADERS = {
    "spec_attention_bf16_amx.h": SOURCES["attention_bf16_amx.cpp"],
    "spec_attention_fp16_avx2_softcap.h": KernelSpec("float16", 64, 80, "avx2", softcap=True),
    "spec_fixed_budget_fp32_avx512.h": KernelSpec(
        "float32", 64, 64, "avx512", kernel="fixed_budget"
    ),
    **{
        f"spec_{kernel}_bf16_avx512.h": KernelSpec("bfloat16", 40, 40, "avx512_bf16", kernel=kernel)
        for kernel in LIST_KERNELS
    },
}
INTRINSIC = re.compile(
    r"\b_mm\d*_|\b_tile_|\b__m\d+|\b__mmask|\b_MM_|\b_CMP_|\basm\b|\b__builtin_ia32|immintrin"
)
INSTRUCTION_HEADER = re.compile(r"(vector|gemm)_\w+\.h")
ALTERNATIVES = ("vector_avx2.h", "gemm_amx.h", "gemm_int8_amx.h")
"""Headers for other instruction sets than the one of the example in kernels/spec.h."""

EMULATED_TILES = r"""
#include <immintrin.h>
#include <cstdint>
#include <cstring>
// Tile registers as plain memory, for machines without AMX; 8 tiles of 16 rows x 64 bytes.
#undef _tile_loadconfig
#undef _tile_storeconfig
#undef _tile_release
#undef _tile_zero
#undef _tile_loadd
#undef _tile_stored
#undef _tile_dpbf16ps
#undef _tile_dpbssd
static thread_local struct { uint8_t config[64]; unsigned char data[8][16][64]; } tiles;
static void emulated_load(int t, const void* base, long stride) {
  for (int r = 0; r < 16; ++r)
    std::memcpy(tiles.data[t][r], (const char*)base + r * stride, 64);
}
static void emulated_store(int t, void* base, long stride) {
  for (int r = 0; r < 16; ++r) std::memcpy((char*)base + r * stride, tiles.data[t][r], 64);
}
static float emulated_float(const unsigned char* p) {
  uint16_t half; std::memcpy(&half, p, 2);
  uint32_t bits = uint32_t(half) << 16; float x; std::memcpy(&x, &bits, 4); return x;
}
static void emulated_dot(int c, int a, int b) {
  if (tiles.config[0] != 1) __builtin_trap();  // tiles used without a configuration
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        float acc; std::memcpy(&acc, tiles.data[c][m] + 4 * n, 4);
        for (int pair = 0; pair < 2; ++pair)
          acc += emulated_float(tiles.data[a][m] + 4 * k + 2 * pair) *
              emulated_float(tiles.data[b][k] + 4 * n + 2 * pair);
        std::memcpy(tiles.data[c][m] + 4 * n, &acc, 4);
      }
}
static void emulated_byte_dot(int c, int a, int b) {
  if (tiles.config[0] != 1) __builtin_trap();
  for (int m = 0; m < 16; ++m)
    for (int k = 0; k < 16; ++k)
      for (int n = 0; n < 16; ++n) {
        int32_t acc; std::memcpy(&acc, tiles.data[c][m] + 4 * n, 4);
        for (int i = 0; i < 4; ++i)
          acc += int(int8_t(tiles.data[a][m][4 * k + i])) * int8_t(tiles.data[b][k][4 * n + i]);
        std::memcpy(tiles.data[c][m] + 4 * n, &acc, 4);
      }
}
#define _tile_loadconfig(p) std::memcpy(tiles.config, (p), 64)
#define _tile_storeconfig(p) std::memcpy((p), tiles.config, 64)
#define _tile_release() std::memset(tiles.config, 0, 64)
#define _tile_zero(t) std::memset(tiles.data[t], 0, 1024)
#define _tile_loadd(t, p, s) emulated_load(t, p, s)
#define _tile_stored(t, p, s) emulated_store(t, p, s)
#define _tile_dpbf16ps(c, a, b) emulated_dot(c, a, b)
#define _tile_dpbssd(c, a, b) emulated_byte_dot(c, a, b)
"""


@pytest.mark.parametrize("name", SPEC_HEADERS)
def test_generated_header_is_the_accepted_one(name: str) -> None:
    assert_golden(generate_spec_header(SPEC_HEADERS[name]), GOLDEN / name)


@pytest.mark.parametrize("name", SOURCES)
def test_joined_source_is_the_accepted_one(name: str) -> None:
    text = generate_source(SOURCES[name])
    assert_golden(text, GOLDEN / name)
    described = library.describe_source(SOURCES[name], text, "x").name
    assert described.startswith(f"cpu_{SOURCES[name].kernel}_bfloat16")


def test_header_for_language_servers_is_the_generated_one() -> None:
    assert_golden(source.generate_example_header(), KERNELS / "spec.h")


@pytest.mark.parametrize("kernel", ["attention", "fixed_budget", "quantize_rows", *LIST_KERNELS])
def test_headers_are_joined_once_each_behind_the_standard_ones(kernel: str) -> None:
    text = generate_source(KernelSpec("bfloat16", 64, 64, "amx", kernel=kernel))
    parts = re.findall(r"^// ---- (\S+)$", text, re.MULTILINE)
    assert parts[0] == "spec.h"
    assert parts[-1] == f"{kernel}.h"
    assert len(set(parts)) == len(parts)
    assert "vector_avx2.h" not in parts
    includes = [line for line in text.splitlines() if "#include" in line or "#pragma once" in line]
    assert text.splitlines()[: len(includes)] == includes
    assert all(re.fullmatch("#include <.*>", line) for line in includes)


def test_every_header_is_part_of_a_kernel() -> None:
    used = {"spec.h"}
    attends = ("attention", "attention_backward", "row_losses")
    kernels = (*attends, "fixed_budget", "quantize_rows", *LIST_KERNELS)
    sets = ("amx", "avx512_bf16", "avx512", "avx2")
    pairs = itertools.product(kernels, sets)
    specs = [KernelSpec("bfloat16", 64, 64, of_set, kernel=kernel) for kernel, of_set in pairs]
    int8 = KernelSpec("bfloat16", 64, 64, "avx512", int8=True, halves=True)
    biased = KernelSpec("bfloat16", 64, 64, "avx512", biased=True)
    for spec in (*specs, half_spec(torch.float16), int8, biased):
        text = generate_source(spec)
        used |= set(re.findall(r"^// ---- (\S+)$", text, re.MULTILINE))
    assert used == {path.name for path in KERNELS.glob("*.h")}


def test_only_headers_of_instruction_sets_name_instructions() -> None:
    """Another instruction set is a vector header and, if it multiplies otherwise, a gemm header."""
    for path in KERNELS.glob("*.h"):
        if not INSTRUCTION_HEADER.fullmatch(path.name):
            assert not INTRINSIC.findall(path.read_text()), path.name


def test_headers_are_short() -> None:
    for path in KERNELS.glob("*.h"):
        assert len(path.read_text().splitlines()) <= 400, path.name


@needs_kernels
@pytest.mark.slow
def test_every_header_parses_on_its_own() -> None:
    """As a language server opens it: with the flags beside it, and what it includes itself."""
    flags = (KERNELS / "compile_flags.txt").read_text().split()
    headers = [path for path in sorted(KERNELS.glob("*.h")) if path.name not in ALTERNATIVES]
    command = [os.environ.get("CXX", "g++"), *flags, "-Werror", "-Wall", "-fsyntax-only"]
    for path in headers:
        # As an include, or `#pragma once` in the main file is a warning.
        done = subprocess.run(
            [*command, "-Wno-unused", "-"],
            input=f'#include "{path.name}"\n',
            capture_output=True,
            text=True,
            check=False,
            cwd=KERNELS,
        )
        assert done.returncode == 0, done.stderr


def test_source_does_not_depend_on_what_varies_between_calls() -> None:
    text = generate_source(SOURCES["attention_bf16_amx.cpp"])
    for name in ("num_keys", "window", "query_offset", "column_count"):
        assert f"a.{name}" in text


@needs_kernels
@pytest.mark.skipif(
    "avx512_bf16" not in instruction_sets(), reason="the AMX source converts with AVX512-bf16"
)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_amx_source_is_right_on_emulated_tiles(
    head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "tiles.h"
    header.write_text(EMULATED_TILES)
    flags = (*library.EXTRA_FLAGS, "-include", str(header))
    monkeypatch.setattr(library, "EXTRA_FLAGS", flags)
    monkeypatch.setattr(library, "load_library", library.load_library.__wrapped__)
    monkeypatch.setattr("mpass.lowering.cpu.attention.load_library", library.load_library)
    monkeypatch.setattr("mpass.lowering.cpu.estimators.load_library", library.load_library)

    generator = torch.Generator().manual_seed(2)
    sizes = {"batch": 1, "num_queries": 203, "num_keys": 250}
    mask = AttentionMask(query_offset=47)
    index = random_index(generator, head_slots=(0, -1), mask=mask, density=0.5, **sizes)
    query, key, value = random_inputs(
        generator, torch.bfloat16, heads=2, kv_heads=1, head_dim=head_dim, value_dim=72, **sizes
    )
    spec = KernelSpec("bfloat16", head_dim, 72, "amx")
    found = run_attention(spec, AttentionInputs(query, key, value, mask, 0.125), index)
    wide = [tensor.double() for tensor in (query, key, value)]
    expected = reference.sparse_attention(AttentionInputs(*wide, mask, 0.125), index)
    assert (found.double() - expected).abs().max() < 2e-2

    rules = [VerticalSlashRule(40, 120), VerticalSlashRule(60, 130)]
    given = EstimateInputs(query, key, mask, [0, 1], 0.125)
    spec = KernelSpec("bfloat16", head_dim, head_dim, "amx", kernel="fixed_budget")
    with estimating_with(spec):
        found = estimators.vertical_slash_index(given, rules)
    assert_same_index(found, vertical_slash_index(given, rules))


@needs_kernels
@pytest.mark.parametrize(
    ("kernel", "function"), [("attention", "sparse_attention"), ("union", "union_index")]
)
def test_amx_source_compiles_with_the_real_instructions(kernel: str, function: str) -> None:
    spec = KernelSpec("bfloat16", 64, 64, "amx", kernel=kernel)
    flags = ("-mavx512f", "-mavx512bw", "-mavx512dq", *library.INSTRUCTION_FLAGS["amx"])
    built = library.compile_source(generate_source(spec), extra_flags=flags)
    assert built[function]
