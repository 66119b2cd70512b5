"""Generated index estimation, interpreted, against mpass.lowering.estimate."""

from __future__ import annotations

import pytest
import torch
from mpass.lowering import estimate as reference
from mpass.lowering.index import AttentionMask, num_query_blocks
from mpass.lowering.triton import block_top_k_index, vertical_slash_index
from mpass.lowering.triton import estimate as generated
from mpass.lowering.triton.launch import device_ints

from tests.triton_cases import padding, poisoned_memory
from tests.truth import random_attention

MASKS = {
    "plain": AttentionMask(),
    "window": AttentionMask(window=130),
    "padding": AttentionMask(key_mask=padding(2, 260)),
    "offset": AttentionMask(query_offset=77),
    "bidirectional": AttentionMask(causal=False),
    "window and padding": AttentionMask(window=90, key_mask=padding(2, 260)),
}
HEADS = [3, 0, 2]
VERTICAL, SLASH = [40, 1, 90], [130, 7, 101]


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


def assert_same(index, expected):
    assert index.head_slots == expected.head_slots
    for tensor, truth in zip(index.tensors(), expected.tensors(), strict=True):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert torch.equal(tensor, truth)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_sums_of_the_last_queries_equal_reference(mask):
    query, key = tensors(mask)
    with poisoned_memory():
        sums = generated.last_query_sums(query, key, mask, HEADS, scale=0.3)
    expected = reference.last_query_sums(query, key, mask, HEADS, scale=0.3)
    for got, truth in zip(sums, expected, strict=True):
        assert (got - truth).abs().max() < 1e-5
    again = generated.last_query_sums(query, key, mask, HEADS, scale=0.3)
    assert torch.equal(sums, again)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_sums_in_half_precision_equal_reference(dtype):
    mask = MASKS["window and padding"]
    query, key = tensors(mask, head_dim=80, dtype=dtype)
    sums = generated.last_query_sums(query, key, mask, HEADS, scale=0.3)
    expected = reference.last_query_sums(query, key, mask, HEADS, scale=0.3)
    for got, truth in zip(sums, expected, strict=True):
        assert (got - truth).abs().max() < 1e-5


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_vertical_slash_selects_what_the_reference_selects(mask):
    query, key = tensors(mask)
    options = {"scale": 0.3, "vertical_sizes": VERTICAL, "slash_sizes": SLASH}
    with poisoned_memory():
        index = vertical_slash_index(query, key, mask, HEADS, **options)
    assert_same(index, reference.vertical_slash_index(query, key, mask, HEADS, **options))


@pytest.mark.parametrize("length", [1, 40, 64])
def test_vertical_slash_of_a_short_prompt_equals_reference(length):
    query, key, _ = random_attention(num_queries=length, seed=2)
    options = {"scale": 0.3, "vertical_sizes": [500], "slash_sizes": [500]}
    index = vertical_slash_index(query, key, AttentionMask(), [1], **options)
    assert_same(index, reference.vertical_slash_index(query, key, AttentionMask(), [1], **options))


def test_ties_go_to_the_smaller_position():
    # Equal keys give equal scores everywhere: only the order of positions can choose.
    query, key, _ = random_attention(num_queries=200)
    key = key[:, :, :1].expand(-1, -1, 200, -1).contiguous()
    mask = AttentionMask(causal=False)
    options = {"scale": 0.3, "vertical_sizes": [50], "slash_sizes": [110]}
    index = vertical_slash_index(query, key, mask, [0], **options)
    assert index.column_index[0, 0].tolist() == list(range(50))
    blocks = block_top_k_index(query * 0, key, mask, [0], top_k=[2], block_sizes=[64])
    assert blocks.block_index[0, 0, :, :2].tolist() == [[0, 1]] * 4


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_block_top_k_selects_what_the_reference_selects(mask):
    query, key = tensors(mask)
    options = {"top_k": [1, 2, 50], "block_sizes": [64, 128, 64]}
    with poisoned_memory():
        index = block_top_k_index(query, key, mask, HEADS, **options)
    assert_same(index, reference.block_top_k_index(query, key, mask, HEADS, **options))


def test_block_scores_taken_in_turns_select_the_same(monkeypatch):
    query, key, _ = random_attention(num_queries=500, num_keys=577, seed=3)
    mask = AttentionMask(query_offset=77)
    options = {"top_k": [2, 1], "block_sizes": [128, 64]}
    expected = reference.block_top_k_index(query, key, mask, [0, 3], **options)
    monkeypatch.setattr(generated, "SCORE_BYTES", 1)
    assert_same(block_top_k_index(query, key, mask, [0, 3], **options), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 70])
def test_block_means_equal_reference(dtype, offset):
    query, _, _ = random_attention(2, num_queries=190, head_dim=48, dtype=dtype)
    mask = AttentionMask(key_mask=padding(2, 190 + offset))
    heads = [2, 1]
    rows = query.float() if dtype == torch.bfloat16 else query
    with poisoned_memory():
        means = generated.pooled_means(
            rows, device_ints(heads, rows.device), 128, mask, offset=offset
        )
    for place, head in enumerate(heads):
        truth = reference.pooled_means(query[:, head], 128, mask, offset=offset)
        assert (means[:, place] - truth).abs().max() < 1e-5


def test_index_does_not_depend_on_the_sizes_of_other_heads():
    query, key, _ = random_attention(num_queries=200)
    mask = AttentionMask()
    sizes = {"scale": 0.3, "vertical_sizes": [35, 80], "slash_sizes": [101, 150]}
    both = vertical_slash_index(query, key, mask, [0, 1], **sizes)
    alone = {"scale": 0.3, "vertical_sizes": [35], "slash_sizes": [101]}
    one = vertical_slash_index(query, key, mask, [0], **alone)
    count = int(one.column_count[0, 0])
    assert count == int(both.column_count[0, 0]) == 35
    assert torch.equal(one.column_index[0, 0, :count], both.column_index[0, 0, :count])
    assert both.block_count.shape == (1, 0, num_query_blocks(200, 0))


def test_host_integers_reach_the_device_beyond_one_launch():
    values = [(-1) ** i * i * 7919 for i in range(150)]
    assert device_ints(values, torch.device("cpu")).tolist() == values
