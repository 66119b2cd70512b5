"""Chips that take another chip's tiles: kernels compiled for their own machine code, and looked at.

The default run compiles two kernels, others every day; `pytest -m slow` all of them.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from mpass.lowering.triton.compile import compile_kernel, machine_code, table_spec
from mpass.lowering.triton.spec import target_of
from tests.helpers.rotation import part_of_today
from tests.lowering.triton.compiled.test_compile import (
    FLAGS,
    HEAD_DIMS,
    MATRIX_UNIT,
    MAX_SPILL,
    SMALL_KERNELS,
)

SHARED_MEMORY = {
    "sm_86": 99 * 1024,
    "sm_89": 99 * 1024,
    "sm_120": 99 * 1024,
    "gfx950": 160 * 1024,
}
"""Bytes that one program may use, of architectures that have no tiles of their own."""

CASES = list(itertools.product(SHARED_MEMORY, HEAD_DIMS, ("lists", "diagonals_columns")))


def check_attention(architecture, head_dim, flags):
    target = target_of(architecture)
    spec = table_spec(target, head_dim, **FLAGS[flags])
    report = compile_kernel(spec, "sparse_attention", architecture)
    assert report.spill_bytes <= MAX_SPILL
    assert report.shared_bytes <= SHARED_MEMORY[architecture]
    assert report.matrix_ops[MATRIX_UNIT[target]] > 0
    return spec


@pytest.mark.parametrize(
    ("architecture", "head_dim", "flags"), part_of_today(CASES, len(CASES) // 2)
)
def test_attention_compiles_for_an_architecture_of_today(architecture, head_dim, flags):
    spec = check_attention(architecture, head_dim, flags)
    code = machine_code(spec, "sparse_attention", architecture)
    text = code.asm["amdgcn" if architecture.startswith("gfx") else "ptx"]
    assert architecture in text


@pytest.mark.slow
@pytest.mark.parametrize("flags", ["lists", "diagonals_columns", "everything"])
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
def test_attention_compiles_for_every_architecture(architecture, head_dim, flags):
    check_attention(architecture, head_dim, flags)


@pytest.mark.slow
@pytest.mark.parametrize("architecture", SHARED_MEMORY)
@pytest.mark.parametrize(("spec", "kernel"), SMALL_KERNELS, ids=lambda x: getattr(x, "template", x))
def test_small_kernels_compile_for_every_architecture(architecture, spec, kernel):
    spec = dataclasses.replace(spec, target=target_of(architecture))
    report = compile_kernel(spec, kernel, architecture)
    assert report.spill_bytes <= MAX_SPILL
    assert report.shared_bytes <= SHARED_MEMORY[architecture]
