"""Generated estimators that cover a share of the attention: what their shared tests do not show."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from mpass.lowering.cpu import estimators as lists
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import flex_prefill as reference_flex_prefill
from mpass.lowering.reference import sample_attention as reference_sample_attention
from mpass.patterns.base import Pattern
from mpass.patterns.flex_prefill import FlexPrefill
from mpass.patterns.sample_attention import SampleAttention
from tests.helpers.cpu_cases import assert_same_index, needs_kernels
from tests.lowering.cpu.estimators.test_estimators import (
    DIM,
    HEADS,
    SCALE,
    assert_nearly_the_same,
    inputs,
)

pytestmark = needs_kernels

PATTERNS: list[tuple[Pattern, str, Callable[..., SparseIndex]]] = [
    (
        FlexPrefill(0.6, 0.0, 65, block_size=64),
        "flex_prefill_index",
        reference_flex_prefill.flex_prefill_index,
    ),
    (
        FlexPrefill(0.5, 1.0, 1, block_size=128),
        "flex_prefill_index",
        reference_flex_prefill.flex_prefill_index,
    ),
    (
        SampleAttention(0.5, 0.1, 0.1),
        "sample_attention_index",
        reference_sample_attention.sample_attention_index,
    ),
]


# By hand: the address of a function is another in every process.
IDS = [f"{name}-{pattern}" for pattern, name, _ in PATTERNS]


@pytest.mark.parametrize(("pattern", "name", "plain"), PATTERNS, ids=IDS)
def test_patterns_estimate_by_generated_code(
    pattern: Pattern, name: str, plain: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    called = []
    generated = getattr(lists, name)
    monkeypatch.setattr(lists, name, lambda *a, **k: called.append(name) or generated(*a, **k))
    query, key = inputs(torch.bfloat16, batch=1, num_queries=300, num_keys=300, kv_heads=2, seed=5)
    own = [pattern] * len(HEADS)
    index = type(pattern).estimate(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), own)
    rules = [pattern.rule()] * len(HEADS)
    assert_nearly_the_same(
        index, plain(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), rules)
    )
    assert called == [name]


@pytest.mark.parametrize(("pattern", "name", "plain"), PATTERNS, ids=IDS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_row_that_is_no_number_does_not_count(
    pattern: Pattern, name: str, plain: Any, value: float
) -> None:
    query, key = inputs(torch.float32, batch=1, num_queries=640, num_keys=640, kv_heads=2, seed=6)
    query[:, :, 639] = value
    query[:, :, 300:303] = value
    rules = [pattern.rule()] * len(HEADS)
    found = getattr(lists, name)(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), rules)
    expected = plain(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), rules)
    assert_nearly_the_same(found, expected)
    assert (found.block_count.sum() + found.column_count.sum()) > 0


def test_full_coverage_keeps_every_key_with_attention() -> None:
    query, key = inputs(torch.float32, batch=1, num_queries=500, num_keys=500, kv_heads=2, seed=7)
    rule = SampleAttention(1.0, 0.5, 0.01).rule()
    index = lists.sample_attention_index(
        EstimateInputs(query * 0.1, key, AttentionMask(), HEADS, SCALE), [rule] * 4
    )
    assert (index.column_count == 500).all()
    wide = FlexPrefill(1.0, 0.0, 64, block_size=64).rule()
    lists_of_all = lists.flex_prefill_index(
        EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), [wide] * 4
    )
    assert torch.equal(lists_of_all.block_count[0, 0], torch.arange(1, 9, dtype=torch.int32))


@pytest.mark.parametrize("budget", [64, 128])
def test_equal_blocks_go_to_the_first_ones(budget: int) -> None:
    """Keys that are all alike: columns and diagonals of equal score, the first of them kept."""
    query, key = torch.randn(1, 1, 640, DIM), torch.ones(1, 1, 640, DIM)
    rule = FlexPrefill(0.01, 0.0, budget, budget, block_size=64).rule()
    found = lists.flex_prefill_index(EstimateInputs(query, key, AttentionMask(), [0], 0.2), [rule])
    expected = reference_flex_prefill.flex_prefill_index(
        EstimateInputs(query, key, AttentionMask(), [0], 0.2), [rule]
    )
    assert found.block_index[0, 0, -1, 0] == 0
    assert found.block_count[0, 0, -1] == budget // 64 * 2
    assert torch.equal(found.block_count, expected.block_count)


def test_mixed_rules_do_not_disturb_each_other() -> None:
    query, key = inputs(torch.bfloat16, batch=2, num_queries=700, num_keys=700, kv_heads=3, seed=8)
    rules = [
        FlexPrefill(0.6, 1.0, 65, block_size=64).rule(),
        FlexPrefill(0.5, 0.0, 1, block_size=256).rule(),
        FlexPrefill(0.9, 1.0, 100, 300, block_size=192).rule(),
    ]
    together = lists.flex_prefill_index(
        EstimateInputs(query, key, AttentionMask(), [4, 1, 2], SCALE), rules
    )
    for i, (head, rule) in enumerate(zip([4, 1, 2], rules, strict=True)):
        alone = lists.flex_prefill_index(
            EstimateInputs(query, key, AttentionMask(), [head], SCALE), [rule]
        )
        assert torch.equal(together.block_count[:, i], alone.block_count[:, 0])
        assert torch.equal(together.block_index[:, i], alone.block_index[:, 0])
    again = lists.flex_prefill_index(
        EstimateInputs(query, key, AttentionMask(), [4, 1, 2], SCALE), rules
    )
    assert_same_index(again, together)
