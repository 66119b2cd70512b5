"""Generated C++ gradients against fp64 gradients over the same cells."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from mpass.lowering.cpu.backward import attention_backward, num_parts, run_backward
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import backward_spec, dtype_name
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference import backward
from mpass.lowering.reference.backward import ForwardResult
from tests.helpers.cpu_cases import attention_cases, make_case, needs_kernels, random_index

pytestmark = needs_kernels

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}
"""Of the largest gradient, for the largest difference."""


def check(
    case: dict, dtype: torch.dtype, head_dim: int, value_dim: int, instructions="", **numbers
) -> tuple[torch.Tensor, ...]:
    """Compare the gradients of one case of `attention_cases` with fp64; the kernel's."""
    generator = torch.Generator().manual_seed(case["seed"])
    tensors, index, mask = make_case(case, generator, dtype, head_dim, value_dim)
    given = AttentionInputs(*tensors, mask, **{"scale": 0.2} | numbers)
    wide = AttentionInputs(*(t.double() for t in tensors), mask, **{"scale": 0.2} | numbers)
    out, lse = reference.sparse_attention_lse(given, index)
    grad_out = torch.randn(out.shape, generator=generator).to(dtype)
    true_out, true_lse = reference.sparse_attention_lse(wide, index)
    true = ForwardResult(grad_out.double(), true_out, true_lse)
    expected = backward.attention_backward(wide, index, true)
    spec = backward_spec(given)
    if instructions:
        size = (head_dim, value_dim)
        spec = KernelSpec(dtype_name(dtype), *size, instructions, kernel="attention_backward")
    found = run_backward(spec, given, index, ForwardResult(grad_out, out, lse))
    for one, other, tensor in zip(found, expected, tensors, strict=True):
        assert one.dtype == dtype and one.shape == tensor.shape and one.is_contiguous()
        error = (one.double() - other).abs().max()
        assert error <= TOLERANCE[dtype] * max(1.0, float(other.abs().max()))
    return found


@settings(max_examples=60)
@given(case=attention_cases())
def test_gradients_equal_fp64_of_drawn_cases(case):
    check(case, case["dtype"], 64, 64)


CASE = {
    **{"causal": True, "num_queries": 200, "num_keys": 237, "offset": 37, "window": 90},
    **{"padding": 0.1, "slots": (0, -1, 1, -2), "kv_heads": 2, "batch": 2, "density": 0.4},
    "seed": 1,
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_softcap_sinks_and_odd_sizes_have_gradients(dtype):
    numbers = {"softcap": 2.0, "sink_logits": torch.linspace(-1, 2, 4), "scale": -0.3}
    check(CASE, dtype, 37, 5, **numbers)


@pytest.mark.slow
@pytest.mark.parametrize("dims", [(64, 64), (128, 128), (80, 48), (37, 5), (256, 256)], ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_gradients_of_every_dtype_and_size(dtype, dims):
    check(CASE, dtype, *dims)
    check(CASE, dtype, *dims, instructions="avx2")
    check(CASE, dtype, *dims, softcap=2.0)


def test_gradients_are_the_same_bits_in_two_runs_of_several_threads():
    """One kv head, so that its query blocks are shared among the threads."""
    case = {**CASE, "slots": (0, -1), "kv_heads": 1, "batch": 1, "num_queries": 700}
    case |= {"num_keys": 737, "window": 0}
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        runs = [check(case, torch.float32, 64, 64) for _ in range(3)]
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(map(torch.equal, run, runs[0]))


def test_units_are_enough_for_the_threads_and_no_more():
    assert num_parts(threads=1, heads=3, num_blocks=9) == 1
    assert num_parts(threads=4, heads=8, num_blocks=9) == 1
    assert num_parts(threads=16, heads=2, num_blocks=100) == 16
    assert num_parts(threads=64, heads=1, num_blocks=5) == 5


def test_no_queries_have_no_gradients():
    tensors = [torch.randn(1, 2, n, 64) for n in (0, 70, 70)]
    given = AttentionInputs(*tensors, AttentionMask(query_offset=70), 0.2)
    generator = torch.Generator()
    sizes = {"batch": 1, "num_queries": 0, "num_keys": 70}
    index = random_index(generator, head_slots=(0, 1), mask=given.mask, density=0.4, **sizes)
    result = ForwardResult(torch.zeros(1, 2, 0, 64), torch.zeros(1, 2, 0, 64), torch.zeros(1, 2, 0))
    found = attention_backward(given, index, result)
    assert [t.shape for t in found] == [t.shape for t in tensors]
    assert not any(t.any() for t in found)
