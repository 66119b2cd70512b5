"""Generated index estimation, interpreted, against mpass.lowering.reference.vertical_slash."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering.index import AttentionMask, num_query_blocks
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import vertical_slash as reference
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from mpass.lowering.triton import vertical_slash as generated
from mpass.lowering.triton.launch import device_ints
from mpass.lowering.triton.vertical_slash import vertical_slash_index
from tests.helpers.rotation import part_of_today
from tests.helpers.triton_cases import assert_same, padding, poisoned_memory
from tests.helpers.truth import random_attention

MASKS = {
    "plain": AttentionMask(),
    "window": AttentionMask(window=130),
    "padding": AttentionMask(key_mask=padding(2, 260)),
    "offset": AttentionMask(query_offset=77),
    "bidirectional": AttentionMask(causal=False),
    "window and padding": AttentionMask(window=90, key_mask=padding(2, 260)),
}
HEADS = [3, 0, 2]
RULES = [VerticalSlashRule(40, 130), VerticalSlashRule(1, 7), VerticalSlashRule(90, 101)]


def tensors(mask: AttentionMask, *, head_dim: int = 32, dtype: torch.dtype = torch.float32):
    batch = 1 if mask.key_mask is None else mask.key_mask.shape[0]
    query, key, _ = random_attention(
        batch,
        num_queries=260 - mask.query_offset,
        num_keys=260,
        head_dim=head_dim,
        dtype=dtype,
        seed=1,
    )
    return query, key


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sums_of_the_last_queries_equal_reference(mask):
    query, key = tensors(mask)
    with poisoned_memory():
        sums = generated.last_query_sums(EstimateInputs(query, key, mask, HEADS, 0.3))
    expected = reference.last_query_sums(EstimateInputs(query, key, mask, HEADS, 0.3))
    for got, truth in zip(sums, expected, strict=True):
        assert (got - truth).abs().max() < 1e-5
    again = generated.last_query_sums(EstimateInputs(query, key, mask, HEADS, 0.3))
    assert torch.equal(sums, again)


@pytest.mark.parametrize("dtype", part_of_today([torch.float16, torch.bfloat16], share=2), ids=str)
def test_sums_in_half_precision_equal_reference(dtype):
    mask = MASKS["window and padding"]
    query, key = tensors(mask, head_dim=80, dtype=dtype)
    sums = generated.last_query_sums(EstimateInputs(query, key, mask, HEADS, 0.3))
    expected = reference.last_query_sums(EstimateInputs(query, key, mask, HEADS, 0.3))
    for got, truth in zip(sums, expected, strict=True):
        assert (got - truth).abs().max() < 1e-5


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_vertical_slash_selects_what_the_reference_selects(mask):
    query, key = tensors(mask)
    arguments = (EstimateInputs(query, key, mask, HEADS, 0.3), RULES)
    with poisoned_memory():
        index = vertical_slash_index(*arguments)
    assert_same(index, reference.vertical_slash_index(*arguments))


@pytest.mark.parametrize("length", [1, 40, 64])
def test_vertical_slash_of_a_short_prompt_equals_reference(length):
    query, key, _ = random_attention(num_queries=length, seed=2)
    given = EstimateInputs(query, key, AttentionMask(), [1], 0.3)
    arguments = (given, [VerticalSlashRule(500, 500)])
    index = vertical_slash_index(*arguments)
    assert_same(index, reference.vertical_slash_index(*arguments))


def test_ties_go_to_the_smaller_position():
    # Equal keys give equal scores everywhere: only the order of positions can choose.
    query, key, _ = random_attention(num_queries=200)
    key = key[:, :, :1].expand(-1, -1, 200, -1).contiguous()
    mask = AttentionMask(causal=False)
    given = EstimateInputs(query, key, mask, [0], 0.3)
    index = vertical_slash_index(given, [VerticalSlashRule(50, 110)])
    assert index.column_index[0, 0].tolist() == list(range(50))


def test_index_does_not_depend_on_the_sizes_of_other_heads():
    query, key, _ = random_attention(num_queries=200)
    mask = AttentionMask()
    rules = [VerticalSlashRule(35, 101), VerticalSlashRule(80, 150)]
    both = vertical_slash_index(EstimateInputs(query, key, mask, [0, 1], 0.3), rules)
    one = vertical_slash_index(EstimateInputs(query, key, mask, [0], 0.3), rules[:1])
    count = int(one.column_count[0, 0])
    assert count == int(both.column_count[0, 0]) == 35
    assert torch.equal(one.column_index[0, 0, :count], both.column_index[0, 0, :count])
    assert both.block_count.shape == (1, 0, num_query_blocks(200, 0))


def test_host_integers_reach_the_device_beyond_one_launch():
    values = [(-1) ** i * i * 7919 for i in range(150)]
    assert device_ints(values, torch.device("cpu")).tolist() == values
