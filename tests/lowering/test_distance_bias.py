"""A bias by distance in every lowering and estimator, held against fp64 dense attention."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpass.lowering.cpu.attention import run_attention
from mpass.lowering.cpu.row_losses import run_row_losses
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, instruction_sets
from mpass.lowering.device import REFERENCE
from mpass.lowering.distance_bias import (
    antidiagonal_line,
    bias_of_queries,
    bias_rows,
    pair_line,
    run_line,
)
from mpass.lowering.exact_rows import row_losses
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference.attention import computed_mask
from mpass.lowering.reference.dense import dense_attention
from mpass.patterns.base.registry import find_pattern
from tests.helpers.cpu_cases import TOLERANCE, needs_kernels, random_index, random_inputs

BATCH, HEADS, KV_HEADS, DIM = 2, 4, 2, 40
LENGTHS = {"num_queries": 150, "num_keys": 215}


def attention(dtype=torch.float32, *, own=True, causal=True, offset=65, window=0, padding=True):
    """Inputs and an index; own: whether each head has a bias of its own."""
    generator = torch.Generator().manual_seed(0)
    sizes = {"batch": BATCH, "heads": HEADS, "kv_heads": KV_HEADS} | LENGTHS
    tensors = random_inputs(generator, dtype, head_dim=DIM, value_dim=24, **sizes)
    key_mask = (
        torch.rand(BATCH, LENGTHS["num_keys"], generator=generator) > 0.2 if padding else None
    )
    mask = AttentionMask(causal, offset if causal else 0, window, key_mask)
    count = LENGTHS["num_queries"] + LENGTHS["num_keys"] - 1
    bias = torch.randn(HEADS if own else 1, count, generator=generator) * 3
    index = random_index(
        generator, batch=BATCH, head_slots=(0, 1, 0, -1), mask=mask, density=0.5, **LENGTHS
    )
    return AttentionInputs(*tensors, mask, 0.3, distance_bias=bias.to(dtype)), index


def truth(inputs: AttentionInputs, index: SparseIndex) -> torch.Tensor:
    """fp64 softmax attention, the bias of each pair looked up by its distance."""
    query, key, value = (tensor.double() for tensor in (inputs.query, inputs.key, inputs.value))
    group = query.shape[1] // key.shape[1]
    key, value = (tensor.repeat_interleave(group, 1) for tensor in (key, value))
    rows, keys = torch.arange(query.shape[2])[:, None], torch.arange(key.shape[2])
    bias = inputs.distance_bias.double()[:, keys - rows + query.shape[2] - 1]
    scores = query @ key.mT * inputs.scale + bias
    sizes = {"num_queries": query.shape[2], "num_keys": key.shape[2]}
    seen = computed_mask(index, inputs.mask, batch=query.shape[0], **sizes)
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0)
    return weights @ value


CASES = {
    "causal chunk with padding": {},
    "one line for all heads": {"own": False},
    "both ways": {"causal": False},
    "window": {"window": 70, "padding": False},
}


@pytest.mark.parametrize("case", CASES)
def test_plain_torch_adds_the_bias_of_each_distance(case):
    inputs, index = attention(torch.float64, **CASES[case])
    found = REFERENCE.sparse_attention(inputs, index)
    assert torch.allclose(found, truth(inputs, index), atol=1e-9)


@needs_kernels
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_generated_kernels_add_the_bias_of_each_distance(dtype, case):
    inputs, index = attention(dtype, **CASES[case])
    sets = [name for name in instruction_sets() if dtype == torch.bfloat16 or "bf16" not in name]
    for name in (name for name in sets if name != "amx" or dtype == torch.bfloat16):
        spec = KernelSpec(dtype_name(dtype), DIM, 24, name, biased=True)
        found = run_attention(spec, inputs, index).double()
        error = (found - truth(inputs, index)).abs().max()
        assert error < 4 * TOLERANCE[dtype], (name, error)


@pytest.mark.parametrize("case", CASES)
def test_dense_attention_of_an_op_adds_the_bias(case):
    from mpass.lowering.dispatch import choose_lowering
    from mpass.lowering.lse_ops import every_key

    inputs, _ = attention(**CASES[case])
    expected = truth(inputs, every_key(inputs))
    for found in (dense_attention(inputs), choose_lowering(inputs).dense_attention(inputs)):
        assert torch.allclose(found.double(), expected, atol=1e-4)


@needs_kernels
def test_losses_of_rows_are_those_of_biased_scores():
    inputs, index = attention()
    spec = KernelSpec("float32", DIM, 24, "avx2", kernel="row_losses", biased=True)
    found = run_row_losses(spec, inputs, index, 16, True)
    expected = row_losses(inputs, index, 16, True)
    assert torch.equal(found.rows, expected.rows)
    seen = found.counted[:, None, :, None]
    assert torch.equal(found.counted, expected.counted) and seen.sum() > 20
    assert torch.allclose(found.lost * seen[..., 0], expected.lost * seen[..., 0], atol=1e-5)
    assert torch.allclose(found.exact * seen, expected.exact * seen, atol=1e-4)


def test_a_span_of_queries_has_the_line_of_its_own():
    inputs, _ = attention()
    line, queries = inputs.distance_bias, LENGTHS["num_queries"]
    own = bias_of_queries(line, 30, 90, queries)
    rows = torch.arange(30, 90)
    expected = bias_rows(line, rows, queries, 0, LENGTHS["num_keys"])
    assert torch.equal(bias_rows(own, rows - 30, 60, 0, LENGTHS["num_keys"]), expected)


@pytest.mark.parametrize("length", [1, 6, 8, 64])
def test_a_run_weighs_as_much_as_its_keys(length):
    line = torch.randn(2, 200, generator=torch.Generator().manual_seed(0)) * 5
    found = run_line(line, length)
    assert found.shape == line.shape
    expected = line.unfold(-1, length, 1).exp().mean(-1).log()
    assert torch.allclose(found[:, : expected.shape[1]], expected, atol=1e-4)


def test_lines_of_groups_are_means_over_their_pairs():
    line = torch.randn(500, generator=torch.Generator().manual_seed(0))
    origin, length, groups = 250, 16, 5
    keys, queries = torch.arange(length)[None], torch.arange(length)[:, None]
    for apart in range(1 - groups, groups):
        tile = line[origin + apart * length + keys - queries]
        across = torch.stack([tile[length - 1 - t, t] for t in range(length)]).mean()
        whole = tile.exp().mean().log()
        place = groups - 1 + apart
        assert torch.isclose(antidiagonal_line(line, origin, length, groups)[place], across)
        assert torch.isclose(pair_line(line, origin, length, groups)[place], whole)


PATTERNS = {
    "union": {},
    "vertical_slash": {"vertical_size": 40, "slash_size": 120},
    "block_sparse": {"top_k": 3},
    "block_max": {"share": 0.9, "sink_blocks": 0, "last_blocks": 0},
    "x_attention": {},
    "flex_prefill": {"tau": 0.9, "gamma": 0.5, "min_budget": 64},
    "sample_attention": {},
}


def estimate_inputs(name: str, causal: bool) -> EstimateInputs:
    """Long enough to leave blocks out; a bias that makes far keys matter, of each head its own."""
    generator = torch.Generator().manual_seed(1)
    num_queries, num_keys, offset = 500, 700, 200
    if not causal:
        num_queries, offset = num_keys, 0
    query = torch.randn(1, HEADS, num_queries, 32, generator=generator)
    key = torch.randn(1, KV_HEADS, num_keys, 32, generator=generator)
    distance = torch.arange(num_queries + num_keys - 1) - (num_queries - 1) - offset
    slopes = torch.tensor([0.02, 0.05, -0.02, 0.0])[:, None]
    mask = AttentionMask(causal, offset)
    bias = slopes * distance.abs() + 4 * ((distance + 320).abs() < 20)
    return EstimateInputs(query, key, mask, range(HEADS), 0.2, bias)


@needs_kernels
@pytest.mark.parametrize("name", PATTERNS)
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_estimators_see_the_bias(name, causal):
    """Generated C++ selects what plain torch does with the bias, which is another set than without.

    A few entries may differ: products are rounded to bf16 where the machine has them.
    """
    cls = find_pattern(name)
    if not causal and not cls.bidirectional:
        pytest.skip("defined for causal attention only")
    inputs = estimate_inputs(name, causal)
    own = [cls(**PATTERNS[name])] * HEADS
    sizes = {"batch": 1, "num_queries": inputs.num_queries, "num_keys": inputs.num_keys}

    def cells(index: SparseIndex) -> torch.Tensor:
        return computed_mask(index, inputs.mask, **sizes)

    found = cells(cls.estimate(inputs, own))
    expected = cells(cls.estimator.reference(inputs, [pattern.rule() for pattern in own]))
    share = (found & expected).sum() / (found | expected).sum()
    assert share > 0.96, share
    blind = cells(cls.estimate(dataclasses.replace(inputs, distance_bias=None), own))
    assert (found & blind).sum() / (found | blind).sum() < share - 0.05


def test_what_is_kept_for_a_kv_head_has_the_mean_of_the_biases():
    from mpass.patterns.base.kv_groups import Turns, merge_heads

    inputs = estimate_inputs("union", True)
    merged = merge_heads(inputs, [0, 0, 1, 1], [Turns(), Turns()])
    expected = inputs.distance_bias.unflatten(0, (2, 2)).mean(1)
    assert torch.allclose(merged.distance_bias, expected)


def gradients_in_fp64(inputs: AttentionInputs, index: SparseIndex) -> list[torch.Tensor]:
    """Of the sum of squares of the output: for query, key, value and bias."""
    leaves = [
        tensor.detach().double().requires_grad_()
        for tensor in (inputs.query, inputs.key, inputs.value, inputs.distance_bias)
    ]
    fields = dict(zip(("query", "key", "value", "distance_bias"), leaves, strict=True))
    truth(dataclasses.replace(inputs, **fields), index).square().sum().backward()
    return [leaf.grad for leaf in leaves]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("lowering", ["reference", pytest.param("cpu", marks=needs_kernels)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_bias(lowering, dtype, case):
    from mpass.lowering.dispatch import find_lowering
    from mpass.lowering.reference.attention import sparse_attention_lse
    from mpass.lowering.reference.backward import ForwardResult, attention_backward

    inputs, index = attention(dtype, **CASES[case])
    wide = dataclasses.replace(
        inputs,
        **{
            name: getattr(inputs, name).double()
            for name in ("query", "key", "value", "distance_bias")
        },
    )
    out, lse = sparse_attention_lse(wide, index)
    grad_bias = torch.zeros_like(inputs.distance_bias, dtype=torch.float32)
    result = ForwardResult(2 * out.to(dtype), out.to(dtype), lse.float(), grad_bias)
    run = attention_backward if lowering == "reference" else None
    run = run or find_lowering(lowering).attention_backward
    found = [*run(inputs, index, result), grad_bias]
    for own, expected in zip(found, gradients_in_fp64(inputs, index), strict=True):
        error = (own.double() - expected).abs().max() / expected.abs().max()
        assert error < 5 * TOLERANCE[dtype], error
