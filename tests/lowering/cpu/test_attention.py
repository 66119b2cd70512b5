"""Generated C++ attention against fp64 attention over the same cells."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from torch._subclasses.fake_tensor import FakeTensorMode

from mpass.lowering.cpu.attention import sparse_attention
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, instruction_sets, unsupported
from mpass.lowering.index import ALL_DIAGONALS, AttentionMask, SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from tests.helpers.cpu_cases import (
    DTYPES,
    PROBE,
    assert_matches_reference,
    attention_cases,
    kernels_of_today,
    needs_kernels,
    random_index,
    random_inputs,
    run_case,
    serves,
)
from tests.helpers.pairwise import Case, pairwise
from tests.helpers.rotation import part_of_today

pytestmark = needs_kernels


KERNELS = kernels_of_today(
    kernel for kernel in itertools.product(DTYPES, instruction_sets()) if serves(*kernel)
)


def cases(values: Iterable[Any]) -> list[Case]:
    """Pairs of a parameter's values, dtypes and instruction sets."""
    return pairwise(
        values, DTYPES, instruction_sets(), allowed=lambda value, *kernel: kernel in KERNELS
    )


# name: batch, head_slots, kv_heads, num_queries, num_keys, offset, window, holes, causal
SHAPES = {
    "one_block": (1, (-1,), 1, 64, 64, 0, 0, False, True),
    "one_query": (1, (0, -1), 1, 1, 1, 0, 0, False, True),
    "ragged": (1, (0, 1), 2, 203, 203, 0, 0, False, True),
    "gqa_batch_mixed_forms": (2, (0, -1, 1, -2), 2, 300, 300, 0, 0, False, True),
    "chunk_after_cache": (1, (0, -1), 1, 150, 470, 320, 0, False, True),
    "chunk_inside_of_a_block": (2, (-1, 0), 1, 131, 400, 269, 0, False, True),
    "window": (1, (0, -1), 1, 400, 400, 0, 97, False, True),
    "narrow_window_chunk": (1, (0, -1), 1, 100, 360, 250, 5, False, True),
    "padding_holes": (3, (0, -1), 2, 260, 260, 0, 0, True, True),
    "padding_window_chunk": (2, (0, -1, 1, -2), 4, 200, 333, 133, 70, True, True),
    "bidirectional": (2, (0, 1), 1, 190, 333, 0, 0, True, False),
    "bidirectional_mixed_forms": (1, (0, -1, -2, 1), 2, 300, 300, 0, 0, False, False),
    "window_both_ways": (1, (0, -1, -2), 1, 400, 400, 0, 97, False, False),
    "narrow_window_both_ways": (2, (-1, 0), 1, 300, 270, 0, 5, True, False),
    "longer_cache_than_needed": (1, (0, -1), 1, 100, 300, 50, 0, False, True),
}


@pytest.mark.parametrize(("shape", "dtype", "instruction_set"), cases(SHAPES), ids=str)
def test_attention_equals_fp64_reference(
    shape: str, dtype: torch.dtype, instruction_set: str
) -> None:
    batch, slots, kv_heads, num_queries, num_keys, offset, window, holes, causal = SHAPES[shape]
    generator = torch.Generator().manual_seed(7)
    key_mask = torch.rand(batch, num_keys, generator=generator) > 0.3 if holes else None
    if key_mask is not None:
        key_mask[0, :70] = False  # left padding: rows with nothing to see, blocks of no key
    mask = AttentionMask(causal, offset, window, key_mask)
    index = random_index(
        generator,
        batch=batch,
        head_slots=slots,
        num_queries=num_queries,
        num_keys=num_keys,
        mask=mask,
        density=0.4,
    )
    inputs = random_inputs(
        generator,
        dtype,
        batch=batch,
        heads=len(slots),
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_keys,
        head_dim=64,
        value_dim=64,
    )
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set)
    assert_matches_reference(spec, inputs, index, mask, scale=0.125)


DIMS = [(128, 128), (80, 48), (37, 5), (64, 192)]


@pytest.mark.parametrize(
    ("dims", "dtype", "instruction_set"), part_of_today(cases(DIMS), share=2), ids=str
)
def test_head_dims_need_not_be_equal_nor_round(
    dims: tuple[int, int], dtype: torch.dtype, instruction_set: str
) -> None:
    head_dim, value_dim = dims
    generator = torch.Generator().manual_seed(3)
    mask = AttentionMask()
    sizes = {"batch": 1, "num_queries": 260, "num_keys": 260}
    index = random_index(generator, head_slots=(0, -1), mask=mask, density=0.5, **sizes)
    inputs = random_inputs(
        generator, dtype, heads=2, kv_heads=1, head_dim=head_dim, value_dim=value_dim, **sizes
    )
    spec = KernelSpec(dtype_name(dtype), head_dim, value_dim, instruction_set)
    assert_matches_reference(spec, inputs, index, mask, scale=head_dim**-0.5)


NUMBERS = ["sinks", "softcap", "both", "negative_scale", "zero_scale"]


@pytest.mark.parametrize(("numbers", "dtype", "instruction_set"), cases(NUMBERS), ids=str)
def test_sinks_softcap_and_any_scale(
    numbers: str, dtype: torch.dtype, instruction_set: str
) -> None:
    generator = torch.Generator().manual_seed(5)
    key_mask = torch.ones(1, 200, dtype=torch.bool)
    key_mask[:, :66] = False
    mask = AttentionMask(key_mask=key_mask)
    sizes = {"batch": 1, "num_queries": 200, "num_keys": 200}
    index = random_index(generator, head_slots=(0, -1), mask=mask, density=0.5, **sizes)
    inputs = random_inputs(
        generator, dtype, heads=2, kv_heads=1, head_dim=64, value_dim=64, **sizes
    )
    softcap = 3.0 if numbers in ("softcap", "both") else 0.0
    sinks = torch.tensor([1.5, -2.0]) if numbers in ("sinks", "both") else None
    scale = {"negative_scale": -0.125, "zero_scale": 0.0}.get(numbers, 0.3)
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set, softcap=softcap > 0)
    assert_matches_reference(
        spec, inputs, index, mask, scale=scale, softcap=softcap, sink_logits=sinks
    )


@settings(max_examples=60)
@given(case=attention_cases())
def test_any_valid_index_gives_the_reference_result(case: dict[str, object]) -> None:
    run_case(case)


@functools.cache
def plain_case(dtype: torch.dtype) -> tuple[AttentionInputs, SparseIndex]:
    generator = torch.Generator().manual_seed(11)
    sizes = {"batch": 2, "num_queries": 700, "num_keys": 700}
    index = random_index(
        generator, head_slots=(0, -1, 1, -2), mask=AttentionMask(), density=0.3, **sizes
    )
    inputs = random_inputs(
        generator, dtype, heads=4, kv_heads=2, head_dim=64, value_dim=64, **sizes
    )
    return AttentionInputs(*inputs, AttentionMask(), 0.125), index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_threads_and_repetition_do_not_change_a_bit(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse_attention(*plain_case(dtype)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_bf16_is_as_exact_as_torch_sdpa() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch": 1, "num_queries": 1024, "num_keys": 1024}
    query, key, value = random_inputs(
        generator, torch.bfloat16, heads=2, kv_heads=2, head_dim=128, value_dim=128, **sizes
    )
    index = random_index(generator, head_slots=(-1, -2), mask=AttentionMask(), density=0.0, **sizes)
    index.diagonal_count.fill_(ALL_DIAGONALS)
    wide = [tensor.double() for tensor in (query, key, value)]
    sdpa = torch.nn.functional.scaled_dot_product_attention
    truth = sdpa(*wide, is_causal=True)
    theirs = (sdpa(query, key, value, is_causal=True).double() - truth).abs()
    ours = sparse_attention(AttentionInputs(query, key, value, AttentionMask(), 128**-0.5), index)
    error = (ours.double() - truth).abs()
    assert error.max() <= 1.5 * theirs.max()
    assert error.mean() <= 1.2 * theirs.mean()


def test_nan_in_a_visible_key_is_not_hidden() -> None:
    case, index = plain_case(torch.float32)
    query, key, value, mask = case.query, case.key, case.value, case.mask
    key = key.clone()
    key[0, 0, 0] = torch.nan
    found = sparse_attention(AttentionInputs(query, key, value, mask, 0.125), index)
    cells = reference.computed_mask(index, mask, batch=2, num_queries=700, num_keys=700)
    poisoned = cells[..., 0] & torch.tensor([True, False]).view(2, 1, 1)
    poisoned[:, 2:] = False  # these heads read kv head 1
    assert poisoned.any()
    assert torch.equal(found.isnan().any(-1), poisoned)


def test_unsupported_names_the_reason() -> None:
    wide = PROBE.double()
    assert "float64" in unsupported(AttentionInputs(wide, wide, wide, AttentionMask(), 1.0))
    assert "differ in dtype" in unsupported(
        AttentionInputs(PROBE, PROBE.half(), PROBE, AttentionMask(), 1.0)
    )
    long = torch.zeros(1, 1, 1, 1024)
    assert "head_dim 1024" in unsupported(AttentionInputs(long, long, PROBE, AttentionMask(), 1.0))
    assert "meta" in unsupported(
        AttentionInputs(PROBE.to("meta"), PROBE, PROBE, AttentionMask(), 1.0)
    )


def test_unsupported_reads_fake_tensors() -> None:
    with FakeTensorMode():
        fake = torch.zeros(1, 2, 100, 64, dtype=torch.bfloat16)
        assert (
            unsupported(AttentionInputs(fake, fake, fake, AttentionMask(), 1.0, softcap=3.0))
            is None
        )
