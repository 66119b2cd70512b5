"""What generated C++ says that an index loses of some rows, against fp64 over the same cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings

from mpass.lowering import exact_rows
from mpass.lowering.cpu import library
from mpass.lowering.cpu.row_losses import row_losses, run_row_losses
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, instruction_sets, kernel_spec
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from tests.helpers.cpu_cases import (
    attention_cases,
    make_case,
    needs_kernels,
    random_index,
    random_inputs,
)
from tests.lowering.cpu.test_source import EMULATED_TILES

pytestmark = needs_kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


def check(case: dict, dtype: torch.dtype, instructions: str = "", **numbers) -> None:
    """Compare losses and outputs of one case of `attention_cases` with fp64, for a few rows."""
    generator = torch.Generator().manual_seed(case["seed"])
    tensors, index, mask = make_case(case, generator, dtype, 40, 24)
    found_of = AttentionInputs(*tensors, mask, **{"scale": 0.4} | numbers)
    wide = AttentionInputs(*(t.double() for t in tensors), mask, **{"scale": 0.4} | numbers)
    spec = replace(kernel_spec(found_of), kernel="row_losses")
    if instructions:
        softcap = found_of.softcap > 0
        spec = KernelSpec(
            dtype_name(dtype), 40, 24, instructions, softcap=softcap, kernel="row_losses"
        )
    for count, outputs in ((37, True), (5, False)):
        expected = exact_rows.row_losses(wide, index, count, outputs)
        found = run_row_losses(spec, found_of, index, count, outputs)
        assert torch.equal(found.rows, expected.rows)
        assert torch.equal(found.counted, expected.counted)
        real = expected.counted[:, None]
        off = ((found.lost - expected.lost) * real).abs().max()
        assert off < TOLERANCE[dtype]
        if not outputs:
            assert found.exact is None
            continue
        gap = ((found.exact - expected.exact) * real[..., None]).abs().max()
        assert gap < TOLERANCE[dtype] * max(1.0, float(expected.exact.abs().max()))


@settings(max_examples=25)
@given(case=attention_cases())
def test_losses_and_outputs_equal_fp64_of_drawn_cases(case):
    check(case, case["dtype"])


CASE = {
    **{"causal": True, "num_queries": 400, "num_keys": 437, "offset": 37, "window": 90},
    **{"padding": 0.1, "slots": (0, -1, 1, -2), "kv_heads": 2, "batch": 2, "density": 0.4},
    "seed": 1,
}


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, pytest.param(torch.float32, marks=pytest.mark.slow)], ids=str
)
def test_softcap_sinks_and_negative_scales(dtype):
    numbers = {"softcap": 2.0, "sink_logits": torch.linspace(-1, 2, 4), "scale": -0.3}
    check(CASE, dtype, **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("instructions", instruction_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_every_instruction_set(dtype, instructions):
    check(CASE, dtype, instructions)


@pytest.mark.slow
@pytest.mark.skipif(
    "avx512_bf16" not in instruction_sets(), reason="the AMX source converts with AVX512-bf16"
)
@pytest.mark.parametrize("head_dim", [64, 40])
def test_amx_source_is_right_on_emulated_tiles(head_dim, tmp_path, monkeypatch):
    header = tmp_path / "tiles.h"
    header.write_text(EMULATED_TILES)
    flags = (*library.EXTRA_FLAGS, "-include", str(header))
    monkeypatch.setattr(library, "EXTRA_FLAGS", flags)
    load = library.load_library.__wrapped__
    monkeypatch.setattr("mpass.lowering.cpu.row_losses.load_library", load)
    generator = torch.Generator().manual_seed(2)
    sizes = {"batch": 2, "num_queries": 503, "num_keys": 550}
    mask = AttentionMask(query_offset=47)
    index = random_index(generator, head_slots=(0, -1, 1), mask=mask, density=0.5, **sizes)
    dims = {"heads": 3, "kv_heads": 1, "head_dim": head_dim, "value_dim": 72}
    tensors = random_inputs(generator, torch.bfloat16, **dims, **sizes)
    given = AttentionInputs(*tensors, mask, 0.125)
    wide = AttentionInputs(*(t.double() for t in tensors), mask, 0.125)
    spec = KernelSpec("bfloat16", head_dim, 72, "amx", kernel="row_losses")
    for count in (48, 16, 5):
        found = run_row_losses(spec, given, index, count, True)
        expected = exact_rows.row_losses(wide, index, count, True)
        assert (found.lost - expected.lost).abs().max() < 1e-2
        assert (found.exact - expected.exact).abs().max() < 2e-2


def test_the_bits_do_not_depend_on_the_number_of_threads():
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch": 1, "num_queries": 700, "num_keys": 700}
    tensors = random_inputs(
        generator, torch.bfloat16, heads=4, kv_heads=1, head_dim=40, value_dim=24, **sizes
    )
    mask = AttentionMask()
    index = random_index(generator, head_slots=(0, 1, 2, 3), mask=mask, density=0.3, **sizes)
    inputs = AttentionInputs(*tensors, mask, 0.4)
    threads = torch.get_num_threads()
    found = []
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            found += [row_losses(inputs, index, 48, True) for _ in range(2)]
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert torch.equal(found[0].lost, other.lost)
        assert torch.equal(found[0].exact, other.exact)
