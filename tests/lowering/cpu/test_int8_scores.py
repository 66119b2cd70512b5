"""Scores in 8 bits: near fp64 attention over the same cells, and exact where 8 bits are too few."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from mpass.lowering.cpu import library, support
from mpass.lowering.cpu.attention import run_attention, sparse_attention
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import instruction_sets, int8_reason, kernel_spec
from mpass.lowering.index import ALL_DIAGONALS, AttentionMask, IndexWidth, SparseIndex, empty_index
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.attention import empty_lse
from tests.helpers.cpu_cases import (
    DTYPES,
    INT8_TOLERANCE,
    attention_cases,
    int8_specs,
    needs_kernels,
    random_index,
    random_inputs,
    run_int8_case,
)
from tests.helpers.rotation import part_of_today
from tests.lowering.cpu.test_attention import SHAPES
from tests.lowering.cpu.test_huge_scores import check
from tests.lowering.cpu.test_source import EMULATED_TILES

REASON = int8_reason(torch.bfloat16)
pytestmark = [
    needs_kernels,
    pytest.mark.skipif(bool(REASON), reason=f"no scores in 8 bits here: {REASON}"),
]

NORM = 0.015
"""Length of that difference over the length of the result."""


BOTH = int8_specs(torch.float32)
OTHERS = [(dtype, spec) for dtype in DTYPES[1:] for spec in int8_specs(dtype)]
KERNELS = [*((torch.float32, spec) for spec in BOTH), *part_of_today(OTHERS, share=3)]
"""Those of fp32, and some of the others: each is compiled for some seconds."""


def in_fp64(inputs: AttentionInputs) -> AttentionInputs:
    query, key, value = (t.double() for t in (inputs.query, inputs.key, inputs.value))
    return dataclasses.replace(inputs, query=query, key=key, value=value)


def errors(spec: KernelSpec, inputs: AttentionInputs, index: SparseIndex) -> tuple[float, float]:
    """The largest difference to fp64 attention, and the relative length of all."""
    expected = reference.sparse_attention(in_fp64(inputs), index)
    found = run_attention(spec, inputs, index).double()
    assert found.isfinite().all()
    difference = found - expected
    return difference.abs().max().item(), (difference.norm() / expected.norm()).item()


@pytest.mark.parametrize(
    ("shape", "kernel"), [(shape, KERNELS[i % len(KERNELS)]) for i, shape in enumerate(SHAPES)]
)
def test_attention_is_near_fp64(shape: str, kernel: tuple[torch.dtype, KernelSpec]) -> None:
    dtype, spec = kernel
    batch, slots, kv_heads, num_queries, num_keys, offset, window, holes, causal = SHAPES[shape]
    generator = torch.Generator().manual_seed(7)
    key_mask = torch.rand(batch, num_keys, generator=generator) > 0.3 if holes else None
    if key_mask is not None:
        key_mask[0, :70] = False
    mask = AttentionMask(causal, offset, window, key_mask)
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    index = random_index(generator, head_slots=slots, mask=mask, density=0.4, **sizes)
    heads = {"heads": len(slots), "kv_heads": kv_heads, "head_dim": 64, "value_dim": 64}
    inputs = random_inputs(generator, dtype, **heads, **sizes)
    greatest, norm = errors(spec, AttentionInputs(*inputs, mask, 0.125), index)
    assert greatest <= INT8_TOLERANCE
    assert norm <= NORM


@settings(max_examples=20)
@given(case=attention_cases())
def test_any_valid_index_gives_nearly_the_reference_result(case: dict[str, object]) -> None:
    run_int8_case(case)


@functools.cache
def plain(dims: tuple[int, int] = (64, 64)) -> tuple[AttentionInputs, SparseIndex]:
    generator = torch.Generator().manual_seed(5)
    sizes = {"batch": 1, "num_queries": 260, "num_keys": 260}
    index = random_index(generator, head_slots=(0, -1), mask=AttentionMask(), density=0.5, **sizes)
    heads = {"heads": 2, "kv_heads": 1, "head_dim": dims[0], "value_dim": dims[1]}
    tensors = random_inputs(generator, torch.float32, **heads, **sizes)
    return AttentionInputs(*tensors, AttentionMask(), dims[0] ** -0.5), index


DIMS = [
    (dims, spec)
    for dims in ((128, 128), (80, 48), (37, 5), (64, 192))
    for spec in int8_specs(torch.float32, *dims)
]


@pytest.mark.parametrize(("dims", "spec"), part_of_today(DIMS, share=len(DIMS) or 1), ids=str)
def test_head_dims_need_not_be_round(dims: tuple[int, int], spec: KernelSpec) -> None:
    inputs, index = plain(dims)
    assert errors(spec, inputs, index)[1] <= NORM


NUMBERS = {
    "sinks": {"sink_logits": torch.tensor([1.5, -2.0])},
    "a sink beyond all": {"sink_logits": torch.tensor([40.0, -2.0])},
    "softcap": {"softcap": 3.0},
    "sinks and softcap": {"softcap": 3.0, "sink_logits": torch.tensor([1.5, -2.0])},
    "negative scale": {"scale": -0.125},
    "no scale": {"scale": 0.0},
}


CAPPED = part_of_today([dataclasses.replace(spec, softcap=True) for spec in BOTH], share=2)
NUMBERED = [
    (numbers, spec)
    for numbers, values in NUMBERS.items()
    for spec in (CAPPED if "softcap" in values else BOTH)
]


@pytest.mark.parametrize("shared", [0.0, 8.0], ids=["", "keys with much in common"])
@pytest.mark.parametrize(("numbers", "spec"), NUMBERED, ids=str)
def test_sinks_softcap_and_any_scale(numbers: str, shared: float, spec: KernelSpec) -> None:
    inputs, index = plain()
    inputs = dataclasses.replace(inputs, key=inputs.key + shared, **NUMBERS[numbers])
    expected = reference.sparse_attention(in_fp64(inputs), index)
    found = run_attention(spec, inputs, index).double()
    for head in range(2):
        difference = (found - expected)[:, head].norm() / expected[:, head].norm()
        assert difference <= 2 * NORM


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_what_all_keys_share_costs_nothing(spec: KernelSpec) -> None:
    inputs, index = plain()
    _, before = errors(spec, inputs, index)
    for common in (torch.linspace(-30, 30, 64), 6 * torch.ones(64)):
        _, after = errors(spec, dataclasses.replace(inputs, key=inputs.key + common), index)
        assert after <= 1.5 * before


@pytest.mark.parametrize("spec", BOTH, ids=str)
def test_log_sum_exps_are_those_of_all_scores(spec: KernelSpec) -> None:
    inputs, index = plain()
    for sinks in (None, torch.tensor([2.0, -1.0])):
        given_ = dataclasses.replace(inputs, key=inputs.key + 3.0, sink_logits=sinks)
        lse = empty_lse(inputs.query)
        run_attention(spec, given_, index, lse)
        expected = reference.sparse_attention_lse(in_fp64(given_), index)[1]
        assert (lse - expected).abs().max() <= 0.02


@pytest.mark.parametrize("spec", BOTH, ids=str)
@pytest.mark.parametrize("rows", ["all", "mixed", "negative"])
@pytest.mark.parametrize("size", [1e4, 1e8, 1e30])
def test_huge_scores_are_computed_exactly(spec: KernelSpec, rows: str, size: float) -> None:
    check(spec, torch.float32, size, rows, "plain", tolerance=INT8_TOLERANCE)


HUGE = [(numbers, spec) for numbers in ("sinks", "window and padding") for spec in BOTH]
HUGE += [("softcap", spec) for spec in CAPPED]


@pytest.mark.parametrize(("numbers", "spec"), HUGE, ids=str)
def test_huge_scores_with_all_else(numbers: str, spec: KernelSpec) -> None:
    check(spec, torch.float32, 1e12, "mixed", numbers, tolerance=INT8_TOLERANCE)


def every_block(query: Tensor) -> SparseIndex:
    blocks = -(-query.shape[2] // 64)
    index = empty_index(query, blocks, IndexWidth(), tuple(-1 - h for h in range(query.shape[1])))
    index.diagonal_count.fill_(ALL_DIAGONALS)
    return index


def outliers(where: str, number: float) -> AttentionInputs:
    """A query, a key or a value at position 70 of 200 that is far from all others."""
    generator = torch.Generator().manual_seed(1)
    names = {"query": 2, "key": 1, "value": 1}
    made = {n: torch.randn(1, heads, 200, 64, generator=generator) for n, heads in names.items()}
    made[where][:, :, 70, 5] = number
    return AttentionInputs(**made, mask=AttentionMask(), scale=0.125)


@pytest.mark.parametrize("spec", BOTH, ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [3e3, -1e9, 1e25])
def test_rows_without_outliers_do_not_suffer(where: str, number: float, spec: KernelSpec) -> None:
    inputs = outliers(where, number)
    index = every_block(inputs.query)
    expected = reference.sparse_attention(in_fp64(inputs), index)
    found = run_attention(spec, inputs, index).double()
    difference = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    assert difference.max() <= 0.1
    before = difference[:, :, :64] if where == "value" else difference
    assert before.mean() <= 1.5 * NORM  # an outlier is a part of the mean key, too


@pytest.mark.parametrize("spec", BOTH, ids=str)
@pytest.mark.parametrize("where", ["query", "key", "value"])
@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_what_is_no_number_stays_none(where: str, number: float, spec: KernelSpec) -> None:
    inputs = outliers(where, number)
    found = run_attention(spec, inputs, every_block(inputs.query)).isfinite()
    sees = torch.arange(200) >= 70 if where != "query" else torch.arange(200) == 70
    if number == float("inf") and where == "key":  # else the score is minus infinity: no weight
        sees = sees & (inputs.query[0, :, :, 5] > 0).all(0)
    assert not found[:, :, sees, 5].any()
    assert found[:, :, :64].all()
    if where == "query":
        assert found[:, :, ~sees].all()


@pytest.mark.parametrize("spec", BOTH, ids=str)
@pytest.mark.parametrize("where", ["key", "value"])
@pytest.mark.parametrize("number", [float("nan"), 1e30])
def test_padding_is_not_looked_at(where: str, number: float, spec: KernelSpec) -> None:
    if where == "value" and not spec.halves and number != number:
        pytest.skip("values in fp32 are multiplied where they lie: zero times NaN, as in eager")
    inputs = outliers(where, number)
    key_mask = (torch.arange(200) != 70)[None]
    clean = dataclasses.replace(outliers(where, 0.0), mask=AttentionMask(key_mask=key_mask))
    inputs = dataclasses.replace(inputs, mask=AttentionMask(key_mask=key_mask))
    index = every_block(inputs.query)
    found, expected = (run_attention(spec, each, index) for each in (inputs, clean))
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", BOTH, ids=str)
@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e25])
def test_values_of_any_size_keep_their_digits(size: float, spec: KernelSpec) -> None:
    inputs, index = plain()
    inputs = dataclasses.replace(inputs, value=inputs.value * size)
    assert errors(spec, inputs, index)[1] <= NORM


def test_threads_and_repetition_do_not_change_a_bit() -> None:
    inputs, index = plain()
    inputs = dataclasses.replace(inputs, int8=True)
    assert kernel_spec(inputs).int8
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 2, 3):
            torch.set_num_threads(threads)
            results.append(sparse_attention(inputs, index))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(results[0], other) for other in results[1:])


def test_without_instructions_scores_are_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(support, "int8_reason", lambda dtype: "no VNNI")
    inputs, _ = plain()
    spec = kernel_spec(dataclasses.replace(inputs, int8=True))
    assert not spec.int8
    assert not spec.halves


@pytest.mark.skipif(
    "avx512_bf16" not in instruction_sets(), reason="the AMX source converts with AVX512-bf16"
)
@pytest.mark.slow
@pytest.mark.parametrize("head_dim", [40, 64])
def test_amx_source_is_right_on_emulated_tiles(
    head_dim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    header = tmp_path / "tiles.h"
    header.write_text(EMULATED_TILES)
    monkeypatch.setattr(library, "EXTRA_FLAGS", (*library.EXTRA_FLAGS, "-include", str(header)))
    monkeypatch.setattr(
        "mpass.lowering.cpu.attention.load_library", library.load_library.__wrapped__
    )
    generator = torch.Generator().manual_seed(2)
    sizes = {"batch": 1, "num_queries": 203, "num_keys": 250}
    mask = AttentionMask(query_offset=47)
    index = random_index(generator, head_slots=(0, -1), mask=mask, density=0.5, **sizes)
    heads = {"heads": 2, "kv_heads": 1, "head_dim": head_dim, "value_dim": 72}
    query, key, value = random_inputs(generator, torch.bfloat16, **heads, **sizes)
    key[:, :, 100] *= 300.0  # one tile is multiplied without 8 bits
    spec = KernelSpec("bfloat16", head_dim, 72, "amx", int8=True)
    inputs = AttentionInputs(query, key, value, mask, 0.125)
    assert errors(spec, inputs, index)[1] <= NORM
