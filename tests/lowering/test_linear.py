"""Linear layers in 8 bits: levels, products, and what weights they were made from."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering.cpu import linear as cpu
from mpass.lowering.cpu.linear import linear_reason, packed_weight
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.reference import linear as reference
from mpass.lowering.reference.linear import LEVELS, ZERO, rotate
from tests.helpers.cpu_cases import needs_kernels

needs_products = pytest.mark.skipif(
    bool(linear_reason(torch.float32)), reason=linear_reason(torch.float32) or "there are products"
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def rows_and_weight(dtype: torch.dtype, inputs: int = 192) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows [2, 40, inputs] with a large channel, a row of zeros and a tiny one; a weight."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 40, inputs, generator=generator)
    rows[..., 5] *= 50
    rows[0, 3] = 0
    rows[1, 7] *= 1e-4
    return rows.to(dtype), torch.randn(96, inputs, generator=generator).to(dtype)


def test_rotation_is_orthogonal_and_its_own_inverse():
    rows = torch.randn(7, 128)
    assert torch.allclose(rotate(rotate(rows)), rows, atol=1e-5)
    weight = torch.randn(9, 128)
    product = rotate(rows).double() @ rotate(weight).double().t()
    assert torch.allclose(product, rows.double() @ weight.double().t(), atol=1e-4)


def test_a_large_channel_costs_other_channels_few_levels():
    """Without the rotation the error would be that of levels of the large channel."""
    rows, weight = rows_and_weight(torch.float32)
    weight[:, 5] = 0
    exact = rows @ weight.t()
    levels, steps = reference.quantize_rows(rows)
    rotated_error = (reference.multiply_rows(levels, weight) * steps - exact).norm()
    plain_steps = rows.abs().amax(-1, keepdim=True) / LEVELS
    plain = torch.round(rows / plain_steps.clamp(min=1e-30)) * plain_steps
    assert rotated_error < 0.5 * (plain @ weight.t() - exact).norm()


@needs_kernels
@pytest.mark.parametrize("instructions", ["avx2", "avx512"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_generated_rows_are_those_of_plain_torch(dtype, instructions, monkeypatch):
    if instructions == "avx512" and not cpu.has("avx512"):
        pytest.skip("the processor has no AVX-512")
    name = str(dtype).removeprefix("torch.")
    spec = KernelSpec(name, 64, 64, instructions, kernel="quantize_rows")
    monkeypatch.setattr(cpu, "quantize_spec", lambda _: spec)
    rows, _ = rows_and_weight(dtype)
    for given in (rows, rows[:, ::2], rows[..., :128], rows.transpose(0, 1), rows[:0]):
        levels, steps = cpu.quantize_rows(given)
        wanted, wanted_steps = reference.quantize_rows(given)
        assert torch.equal(steps, wanted_steps)
        assert (levels.int() - wanted.int()).abs().amax() <= 1 if levels.numel() else True
        assert (levels != wanted).sum() <= levels.numel() // 1000  # of a sum rounded once


@needs_kernels
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("module", [cpu, reference], ids=["cpu", "reference"])
def test_a_row_that_is_not_finite_stays_so(module, bad):
    rows, weight = rows_and_weight(torch.float32)
    rows[1, 2, 9] = bad
    levels, steps = module.quantize_rows(rows)
    out = reference.multiply_rows(levels, weight) * steps
    assert out[1, 2].isnan().all()
    assert out.isfinite().sum() == out.numel() - weight.shape[0]


@needs_products
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_are_exact_sums_of_levels(dtype):
    rows, weight = rows_and_weight(dtype)
    levels, steps = reference.quantize_rows(rows)
    out, wanted = cpu.multiply_rows(levels, weight), reference.multiply_rows(levels, weight)
    assert out.dtype == dtype
    assert out.shape == (2, 40, 96)
    assert torch.allclose(out.double(), wanted.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-6)
    exact = rows.double() @ weight.double().t()
    assert (out.double() * steps - exact).norm() < 0.02 * exact.norm()


@needs_products
def test_sums_of_the_greatest_levels_do_not_saturate():
    """A level of 255 times one of 127, many times: products of pairs would not fit 16 bits."""
    levels = torch.full((3, 1024), 255, dtype=torch.uint8)
    weight = rotate(torch.ones(5, 1024))  # rotated again, every level is the greatest
    out = cpu.multiply_rows(levels, weight)
    assert torch.allclose(out, torch.full_like(out, float(1024 * (255 - ZERO))), rtol=1e-5)


@needs_products
def test_a_weight_that_was_written_to_is_rounded_anew():
    rows, weight = rows_and_weight(torch.float32)
    levels, _ = reference.quantize_rows(rows)
    before = packed_weight(weight)
    assert packed_weight(weight) is before
    weight.mul_(2)
    assert torch.equal(cpu.multiply_rows(levels, weight), reference.multiply_rows(levels, weight))
    weight.data = torch.randn_like(weight)
    assert torch.equal(cpu.multiply_rows(levels, weight), reference.multiply_rows(levels, weight))
    with torch.inference_mode():
        other = torch.randn(96, 192)
        cpu.multiply_rows(levels, other)
        other.mul_(3)
        assert torch.equal(cpu.multiply_rows(levels, other), reference.multiply_rows(levels, other))


@pytest.mark.parametrize(
    ("shape", "outputs"), [((2, 70, 40), 24), ((1300, 64), 130), ((3, 50, 20000), 260), ((0, 8), 4)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_a_layer_in_fp32_is_the_exact_one_rounded_once(shape, outputs, bias):
    """Shapes of one part, of several parts of rows, and of several slabs of the weight."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(shape, generator=generator).bfloat16()
    weight = torch.randn(outputs, shape[-1], generator=generator).bfloat16()
    added = torch.randn(outputs, generator=generator).bfloat16() if bias else None
    found = cpu.linear_in_fp32(rows, weight, added)
    exact = torch.nn.functional.linear(
        rows.double(), weight.double(), None if added is None else added.double()
    )
    assert found.dtype == torch.bfloat16 and found.shape == exact.shape
    rounding = exact.abs() * 2**-8 + 1e-4 * shape[-1] ** 0.5
    assert ((found.double() - exact).abs() <= rounding).all()
    assert torch.equal(found, cpu.linear_in_fp32(rows, weight, added))


def test_memory_for_layers_in_fp32_serves_both_kinds_of_tensors():
    """It is kept between calls, and a tensor made under inference mode could not be written to."""
    cpu.scratch.cache_clear()
    rows, weight = torch.randn(200, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    with torch.inference_mode():
        first = cpu.linear_in_fp32(rows, weight)
    assert torch.equal(first, cpu.linear_in_fp32(rows, weight))
