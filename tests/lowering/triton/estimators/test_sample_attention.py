"""sample_attention's columns and flex_prefill's lists, interpreted, against plain torch."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import flex_prefill as reference_flex_prefill
from mpass.lowering.reference import sample_attention as reference
from mpass.lowering.reference.flex_prefill import FlexPrefillRule
from mpass.lowering.reference.sample_attention import SampleAttentionRule
from mpass.lowering.triton.flex_prefill import flex_prefill_index
from mpass.lowering.triton.sample_attention import sample_attention_index
from tests.helpers.triton_cases import assert_same, padding, poisoned_memory
from tests.helpers.truth import random_attention

LENGTH, SCALE = 333, 0.3
RULE = SampleAttentionRule(0.7, 0.3, 0.2, max_window=100, max_columns=200)
RULES = [RULE, dataclasses.replace(RULE, coverage=1.0, max_columns=90), RULE]
HEADS = [3, 0, 2]
MASKS = {
    "plain": AttentionMask(),
    "window": AttentionMask(window=130),
    "padding": AttentionMask(key_mask=padding(2, LENGTH)),
    "offset": AttentionMask(query_offset=77),
    "bidirectional": AttentionMask(causal=False),
    "bidirectional padding": AttentionMask(causal=False, key_mask=padding(2, LENGTH)),
    "all": AttentionMask(window=90, query_offset=77, key_mask=padding(2, LENGTH)),
}


def tensors(mask: AttentionMask, *, head_dim: int = 32, dtype: torch.dtype = torch.float32):
    batch = 1 if mask.key_mask is None else mask.key_mask.shape[0]
    num_queries = LENGTH - mask.query_offset
    query, key, _ = random_attention(
        batch, num_queries=num_queries, num_keys=LENGTH, head_dim=head_dim, dtype=dtype, seed=1
    )
    return query * 2, key


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sampled_rows_select_what_the_reference_selects(mask):
    arguments = (EstimateInputs(*tensors(mask), mask, HEADS, SCALE), RULES)
    with poisoned_memory():
        index = sample_attention_index(*arguments)
    assert_same(index, reference.sample_attention_index(*arguments))


@pytest.mark.parametrize("row_share", [0.001, 1.0])
def test_one_row_and_every_row_select_what_the_reference_selects(row_share):
    mask = MASKS["offset"]
    rules = [RULE, dataclasses.replace(RULE, row_share=row_share)]
    arguments = (EstimateInputs(*tensors(mask, head_dim=80), mask, [1, 3], 0.1), rules)
    with poisoned_memory():
        index = sample_attention_index(*arguments)
    assert_same(index, reference.sample_attention_index(*arguments))


def test_sampled_rows_in_half_precision_give_nearly_the_same_columns():
    mask = MASKS["padding"]
    given = EstimateInputs(*tensors(mask, dtype=torch.bfloat16), mask, HEADS, SCALE)
    arguments = (given, RULES)
    index = sample_attention_index(*arguments)
    expected = reference.sample_attention_index(*arguments)
    same = (index.column_index == expected.column_index).float().mean()
    assert same >= 0.97


FLEX = FlexPrefillRule(0.6, 0.1, 64, 192, 64, max_blocks=5)
FLEX_RULES = {
    "columns and diagonals": [dataclasses.replace(FLEX, tau=0.0), FLEX],
    "pooled queries": [dataclasses.replace(FLEX, tau=1.0, gamma=0.9), FLEX],
    "larger blocks": [dataclasses.replace(FLEX, block_size=128, max_blocks=4, tau=0.3)] * 2,
}


CAUSAL = {name: mask for name, mask in MASKS.items() if mask.causal}
"""Masks under which flex_prefill is defined."""


@pytest.mark.parametrize("rules", FLEX_RULES.values(), ids=FLEX_RULES)
@pytest.mark.parametrize("mask", CAUSAL.values(), ids=CAUSAL)
def test_flex_prefill_selects_what_the_reference_selects(mask, rules):
    arguments = (EstimateInputs(*tensors(mask), mask, [3, 0], SCALE), rules)
    with poisoned_memory():
        index = flex_prefill_index(*arguments)
    assert_same(index, reference_flex_prefill.flex_prefill_index(*arguments))
