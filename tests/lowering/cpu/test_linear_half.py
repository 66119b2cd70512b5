"""Linear layers multiplied in half precision, held against plain torch and the exact layer."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpass.lowering.cpu import support
from mpass.lowering.cpu.linear import linear_in_fp32
from mpass.lowering.cpu.linear_half import half_linear_reason, linear_in_half
from mpass.lowering.reference import linear as reference
from tests.helpers.cpu_cases import needs_kernels

REASON = half_linear_reason(torch.bfloat16)
needs_half = pytest.mark.skipif(bool(REASON), reason=REASON or "it multiplies them")

DTYPES = (torch.bfloat16, torch.float16)

SHAPES = [
    pytest.param(50, 100, 70, id="parts of every tile"),
    pytest.param(1, 1, 1, id="one number"),
    pytest.param(205, 33, 64, id="more than a block of rows"),
    pytest.param(13, 600, 65, id="deeper than a panel"),
]


def layer(rows: int, inputs: int, outputs: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Rows with a large channel, one of zeros and a tiny one; a weight and a bias."""
    generator = torch.Generator().manual_seed(rows)
    x = torch.randn(rows, inputs, generator=generator)
    x[:, inputs // 2] *= 50
    x[rows // 2] *= 1e-4
    x[rows // 3] = 0
    weight = torch.randn(outputs, inputs, generator=generator) * 0.05
    return x.to(dtype), weight.to(dtype), torch.randn(outputs, generator=generator).to(dtype)


def exact(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The layer in fp64."""
    added = None if bias is None else bias.double()
    return torch.nn.functional.linear(x.double(), weight.double(), added)


@needs_half
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("rows", "inputs", "outputs"), SHAPES)
def test_kernel_gives_the_bits_of_plain_torch(rows, inputs, outputs, dtype):
    x, weight, bias = layer(rows, inputs, outputs, dtype)
    for added in (None, bias):
        found = linear_in_half(x, weight, added)
        assert torch.equal(found, reference.linear_in_half(x, weight, added))


@needs_half
def test_a_weight_of_several_slabs_and_a_batch_of_strided_rows():
    x, weight, bias = layer(140, 40000, 130, torch.bfloat16)
    both = torch.stack([x, -x])[:, ::2]
    found = linear_in_half(both, weight, bias)
    wanted = exact(both, weight, bias)
    assert found.shape == wanted.shape
    assert (found.double() - wanted).norm() < 3e-3 * wanted.norm()
    assert torch.equal(found, linear_in_half(both.contiguous(), weight, bias))
    shared = weight.t().contiguous().t()  # rows that are not contiguous
    assert torch.equal(found, linear_in_half(both, shared, bias))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_loses_less_than_rounding_the_result_to_bf16(dtype):
    x, weight, _ = layer(64, 576, 96, dtype)
    wanted = exact(x, weight)
    rounded = (wanted.bfloat16().double() - wanted).norm()
    for numbers in (x, weight):
        narrow, undone = reference.half_rows(numbers)
        assert ((narrow.double() * undone - numbers.double()).abs() <= undone * 2**-25).all()
    found = reference.linear_in_half(x.float(), weight.float())  # not rounded to bf16 at the end
    assert (found.double() - wanted).norm() < rounded


HARD = ["normal", "of one sign", "all equal", "one large number", "cancelling", "of many sizes"]


@needs_half
@pytest.mark.parametrize("depth", [8, 576, 2048])
@pytest.mark.parametrize("kind", HARD)
def test_layers_lose_little_more_than_the_rounding_of_their_input_and_result(kind, depth):
    generator = torch.Generator().manual_seed(depth)
    x = torch.randn(48, depth, generator=generator)
    weight = torch.randn(64, depth, generator=generator).bfloat16()
    if kind == "of one sign":
        x, weight = x.abs(), weight.abs()
    if kind == "all equal":
        x = x[:, :1].expand(-1, depth)
    if kind == "one large number":
        x[:, depth // 3] = 1e4
    if kind == "cancelling":
        x[:, depth // 2 :] = -x[:, : depth // 2] * (1 + 0.01 * x[:, depth // 2 :])
        weight[:, depth // 2 :] = weight[:, : depth // 2]
    if kind == "of many sizes":
        x = x * torch.exp2(-40 * torch.rand(48, depth, generator=generator))
    wanted, narrow = exact(x, weight), x.bfloat16()
    input_rounded = (exact(narrow, weight) - wanted).norm()
    eager = (torch.nn.functional.linear(narrow, weight).double() - exact(narrow, weight)).norm()
    found = (linear_in_half(narrow, weight).double() - exact(narrow, weight)).norm()
    assert found <= 1.12 * eager + 0.5 * input_rounded * (kind == "cancelling")


@needs_half
@pytest.mark.parametrize("size", [1e-30, 1e-4, 1e20, 3e38])
def test_numbers_of_any_size_neither_overflow_nor_vanish(size):
    x, weight, _ = layer(20, 96, 70, torch.bfloat16)
    x, weight = (x.float() / x.abs().max() * size).bfloat16(), weight.double()
    weight = (weight / weight.abs().max() / max(size, 1)).bfloat16()
    found, wanted = linear_in_half(x, weight), exact(x, weight)
    assert found.isfinite().all()
    assert (found.double() - wanted).norm() < 3e-3 * wanted.norm()
    ones = torch.full((130, 64), 1.0)
    ones = ones.bfloat16() * 1e4
    assert torch.equal(linear_in_half(ones, ones), exact(ones, ones).bfloat16())


@needs_half
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", ["input", "weight", "last input"])
def test_what_is_not_finite_is_multiplied_in_fp32(bad, place):
    x, weight, bias = layer(50, 100, 70, torch.bfloat16)
    (weight if place == "weight" else x)[3, 99 if place == "last input" else 5] = bad
    found, wanted = linear_in_half(x, weight, bias), linear_in_fp32(x, weight, bias)
    assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))
    assert not found.isfinite().all()


@needs_half
def test_threads_change_no_bit():
    x, weight, bias = layer(500, 200, 150, torch.bfloat16)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(linear_in_half(x, weight, bias))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


@needs_half
@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(0, 8, 4), (3, 0, 4), (3, 8, 0)])
def test_a_layer_without_numbers_is_what_torch_says(rows, inputs, outputs):
    x, weight = torch.ones(rows, inputs).bfloat16(), torch.ones(outputs, inputs).bfloat16()
    bias = torch.arange(outputs).bfloat16()
    wanted = torch.nn.functional.linear(x, weight, bias)
    assert torch.equal(linear_in_half(x, weight, bias), wanted)
    assert torch.equal(linear_in_fp32(x, weight, bias), wanted)


@needs_kernels
def test_the_reason_against_it_names_the_dtype_or_the_machine(monkeypatch):
    assert "not float32" in half_linear_reason(torch.float32)
    support.fp16_fault.cache_clear()
    monkeypatch.setattr(support, "has", lambda instructions: False)
    assert half_linear_reason(torch.bfloat16) == "the processor has no AVX512-FP16"
    support.fp16_fault.cache_clear()
    monkeypatch.setattr(support, "has", lambda instructions: True)
    monkeypatch.setattr(support, "compiler_fault", lambda instructions: "it failed")
    assert half_linear_reason(torch.bfloat16) == "it failed: AVX512-FP16 needs g++ 12 or newer"
    support.fp16_fault.cache_clear()
