"""A bias by distance in the generated Triton kernels, interpreted, against plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpass.lowering.reference.attention import computed_mask
from mpass.lowering.triton.attention import sparse_attention, sparse_attention_lse
from mpass.lowering.triton.sample_attention import sample_attention_index
from mpass.lowering.triton.union import vertical_block_index_by
from mpass.lowering.triton.vertical_slash import vertical_slash_index
from mpass.patterns.base.registry import find_pattern
from tests.helpers.triton_cases import poisoned_memory
from tests.lowering.test_distance_bias import HEADS, PATTERNS, attention, estimate_inputs, truth

CASES = {
    "causal chunk with padding": {},
    "one line for all heads": {"own": False, "padding": False},
    "both ways": {"causal": False},
    "window": {"window": 70, "padding": False},
}


SLOW = ("one line for all heads", "window")


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=[pytest.mark.slow] * (case in SLOW)) for case in CASES]
)
def test_attention_adds_the_bias_of_each_distance(case):
    inputs, index = attention(**CASES[case])
    with poisoned_memory():
        found = sparse_attention(inputs, index)
    assert torch.allclose(found.double(), truth(inputs, index), atol=1e-4)


@pytest.mark.parametrize("scale", [pytest.param(-0.3, marks=pytest.mark.slow), 0.0])
def test_scales_that_are_not_positive_leave_the_bias_as_it_is(scale):
    inputs, index = attention(padding=False)
    inputs = dataclasses.replace(inputs, scale=scale)
    found, lse = sparse_attention_lse(inputs, index)
    assert torch.allclose(found.double(), truth(inputs, index), atol=1e-4)
    assert lse.isfinite().all()


ESTIMATES = {
    "union": vertical_block_index_by,
    "union in 8 bits": lambda inputs, rules: vertical_block_index_by(inputs, rules, int8=True),
    "vertical_slash": vertical_slash_index,
    "sample_attention": sample_attention_index,
}


@pytest.mark.parametrize(
    ("name", "causal"),
    [
        ("union", True),
        pytest.param("union", False, marks=pytest.mark.slow),
        pytest.param("union in 8 bits", True, marks=pytest.mark.slow),
        ("vertical_slash", True),
        pytest.param("sample_attention", True, marks=pytest.mark.slow),
        ("sample_attention", False),
    ],
)
def test_estimators_see_the_bias(name, causal):
    cls = find_pattern(name.split()[0])
    inputs = estimate_inputs(cls.name, causal)
    rules = [cls(**PATTERNS[cls.name]).rule()] * HEADS
    sizes = {"batch": 1, "num_queries": inputs.num_queries, "num_keys": inputs.num_keys}

    def cells(inputs, estimate):
        return computed_mask(estimate(inputs, rules), inputs.mask, **sizes)

    found = cells(inputs, ESTIMATES[name])
    expected = cells(inputs, cls.estimator.reference)
    share = (found & expected).sum() / (found | expected).sum()
    assert share > 0.96, share
    blind = cells(dataclasses.replace(inputs, distance_bias=None), cls.estimator.reference)
    assert (found & blind).sum() / (found | blind).sum() < share - 0.05
