"""Generated lists of key blocks, interpreted, against plain torch."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from mpass.lowering.dispatch import find_lowering
from mpass.lowering.index import AttentionMask, IndexWidth, empty_index
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import block_scores as reference_block_scores
from mpass.lowering.reference import block_sparse as reference
from mpass.lowering.reference import union as reference_union
from mpass.lowering.reference import vertical_slash as reference_vertical_slash
from mpass.lowering.reference import x_attention as reference_x_attention
from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.lowering.reference.block_sparse import BlockSparseRule
from mpass.lowering.reference.pooled_keys import pooled_keys
from mpass.lowering.reference.union import VerticalBlockRule
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from mpass.lowering.reference.x_attention import XAttentionRule
from mpass.lowering.triton import block_scores, list_blocks, union, x_attention
from mpass.lowering.triton import pooled_keys as pooled
from mpass.lowering.triton.block_scores import block_scores_index
from mpass.lowering.triton.block_sparse import block_sparse_index
from mpass.lowering.triton.launch import device_ints
from mpass.lowering.triton.union import vertical_block_index, vertical_block_index_by
from mpass.lowering.triton.vertical_slash import vertical_slash_index
from mpass.lowering.triton.x_attention import x_attention_index
from mpass.patterns.base import find_pattern
from mpass.patterns.base import scored as lists
from tests.helpers.rotation import part_of_today
from tests.helpers.triton_cases import assert_same, padding, poisoned_memory
from tests.helpers.truth import random_attention

LENGTH, SCALE = 333, 0.3
MASKS = {
    "plain": AttentionMask(),
    "window": AttentionMask(window=130),
    "narrow window": AttentionMask(window=1),
    "padding": AttentionMask(key_mask=padding(2, LENGTH)),
    "offset": AttentionMask(query_offset=77),
    "bidirectional": AttentionMask(causal=False),
    "bidirectional padding": AttentionMask(causal=False, key_mask=padding(2, LENGTH)),
    "all": AttentionMask(window=90, query_offset=77, key_mask=padding(2, LENGTH)),
}
MASKS_TODAY = part_of_today(list(MASKS), share=2)
"""Masks that the dear kernels are interpreted for."""

HEADS = [3, 0, 2]

TOP_P = BlockScoresRule(None, 0.6, 64, sink_blocks=1, local_blocks=1, last_blocks=0, max_blocks=5)
MAX = BlockScoresRule(0.5, None, 64, sink_blocks=0, local_blocks=1, last_blocks=1, max_blocks=5)
BLOCK_SCORES = {
    "share": [MAX, dataclasses.replace(MAX, share=0.9, block_size=128, max_blocks=6), MAX],
    "mass": [
        TOP_P,
        dataclasses.replace(TOP_P, mass=0.9, block_size=128, sink_blocks=0, max_blocks=4),
        dataclasses.replace(TOP_P, mass=1.0, last_blocks=1),
    ],
}
UNION = [
    VerticalBlockRule(0.6, 1.0, 33, 1, 2, 0, rows=16, pool=8, max_blocks=6, last_queries=16),
    VerticalBlockRule(0.6, 0.3, 0, 0, 1, 0, rows=64, pool=64, max_blocks=6, last_queries=64),
    VerticalBlockRule(0.5, 0.3, 17, 0, 1, 1, rows=16, pool=8, max_blocks=3, last_queries=32),
]
X_ATTENTION = [
    XAttentionRule(0.6, 8, 64, 1, 1, 0, max_blocks=5),
    XAttentionRule(0.5, 16, 192, 0, 1, 1, max_blocks=6),
    XAttentionRule(0.9, 64, 128, 1, 1, 0, max_blocks=4),
]


def tensors(mask: AttentionMask, *, head_dim: int = 32, dtype: torch.dtype = torch.float32):
    batch = 1 if mask.key_mask is None else mask.key_mask.shape[0]
    query, key, _ = random_attention(
        batch,
        num_queries=LENGTH - mask.query_offset,
        num_keys=LENGTH,
        head_dim=head_dim,
        dtype=dtype,
        seed=1,
    )
    return query * 2, key


def agreement(index, expected) -> float:
    """Share of equal entries in the tensor where most differ."""
    pairs = zip(index.tensors(), expected.tensors(), strict=True)
    return min(float((ours == theirs).float().mean()) for ours, theirs in pairs if ours.numel())


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_block_top_k_selects_what_the_reference_selects(mask):
    query, key = tensors(mask)
    rules = [BlockSparseRule(1, 64), BlockSparseRule(2, 128), BlockSparseRule(50, 64)]
    arguments = (EstimateInputs(query, key, mask, HEADS, 1.0), rules)
    with poisoned_memory():
        index = block_sparse_index(*arguments)
    assert_same(index, reference.block_sparse_index(*arguments))


def test_block_scores_taken_in_chunks_select_the_same(monkeypatch):
    query, key, _ = random_attention(num_queries=500, num_keys=577, seed=3)
    mask = AttentionMask(query_offset=77)
    given = EstimateInputs(query, key, mask, [0, 3], 1.0)
    arguments = (given, [BlockSparseRule(2, 128), BlockSparseRule(1, 64)])
    expected = reference.block_sparse_index(*arguments)
    monkeypatch.setattr(list_blocks, "SCORE_BYTES", 1)
    assert_same(block_sparse_index(*arguments), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("offset", [0, 70])
def test_block_means_equal_reference(dtype, offset):
    query, _, _ = random_attention(2, num_queries=190, head_dim=48, dtype=dtype)
    mask = AttentionMask(key_mask=padding(2, 190 + offset))
    heads = [2, 1]
    rows = query.float() if dtype == torch.bfloat16 else query
    with poisoned_memory():
        means, _ = pooled.pooled_means(
            rows,
            device_ints(heads, rows.device),
            128,
            mask,
            offset=offset,
            dtype=torch.float32,
        )
    for place, head in enumerate(heads):
        truth = reference.pooled_means(query[:, head], 128, mask, offset=offset)
        assert (means[:, place] - truth).abs().max() < 1e-5


@pytest.mark.parametrize("size", [4, 8, 64, 192])
def test_pooled_keys_equal_reference(size):
    _, key, _ = random_attention(2, num_queries=190, head_dim=48)
    mask = AttentionMask(key_mask=padding(2, 190))
    with poisoned_memory():
        found = pooled.pooled_keys(key, mask, size)
    means, weights = found.means, found.weights
    for head in range(2):
        truth, counts = pooled_keys(key[:, head], mask, size, max(size, 64))
        assert (means[:, head] - truth).abs().max() < 1e-5
        assert torch.equal(weights[:, head] >= 0, counts > 0)
        assert (weights[:, head].exp2() - counts).abs().max() < 1e-4


@pytest.mark.parametrize("size", [8, 192])
def test_means_in_8_bits_are_those_of_the_keys_less_one_vector(size):
    _, key, _ = random_attention(2, num_queries=190, head_dim=48)
    key += 5 * torch.randn(1, 2, 1, 48, generator=torch.Generator().manual_seed(0))
    mask = AttentionMask(key_mask=padding(2, 190))
    with poisoned_memory():
        found = pooled.pooled_keys(key, mask, size, int8=True)
    assert found.means.dtype == torch.int8 and found.means.shape[-1] == 64
    assert not found.means[..., 48:].any()
    for head in range(2):
        truth, counts = pooled_keys(key[:, head], mask, size, max(size, 64))
        means = found.means[:, head, :, :48] * found.steps[:, head, :, None]
        for b in range(2):
            some = counts[b] > 0
            less = truth[b, some] - means[b, some]
            centre = less.mean(0)
            # Half a step of its own is what a number is rounded by.
            rounding = (less - centre).abs().amax(1)
            assert (rounding <= found.steps[b, head, some] * 0.75).all()
            assert centre.norm() > 10
        assert (found.weights[:, head].exp2() - counts).abs().max() < 1e-4


@pytest.mark.parametrize(
    ("mask", "lines"), part_of_today(itertools.product(MASKS_TODAY, (64, 128)), share=6)
)
def test_union_in_8_bits_selects_nearly_what_the_reference_selects(mask, lines):
    mask = MASKS[mask]
    query, key = tensors(mask, head_dim=80)
    arguments = (EstimateInputs(query, key, mask, HEADS, 0.1), UNION)
    with poisoned_memory():
        index = vertical_block_index_by(*arguments, int8=True, lines=lines)
        again = vertical_block_index_by(*arguments, int8=True, lines=lines)
    assert_same(index, again)
    assert agreement(index, reference_union.vertical_block_index(*arguments)) >= 0.97


def test_more_rows_per_program_select_the_same():
    mask = MASKS["all"]
    query, key = tensors(mask)
    arguments = (EstimateInputs(query, key, mask, HEADS, SCALE), UNION)
    index = vertical_block_index_by(*arguments, lines=128)
    assert_same(index, reference_union.vertical_block_index(*arguments))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_key_that_is_not_finite_changes_nothing_in_8_bits_for_rows_before_it(bad):
    query, key = tensors(MASKS["plain"])
    broken = key.clone()
    broken[:, :, 256] = bad
    lists = [
        vertical_block_index_by(
            EstimateInputs(query, k, AttentionMask(), [1], SCALE),
            [dataclasses.replace(UNION[0], columns=0)],
            int8=True,
        )
        for k in (key, broken)
    ]
    counts = [index.block_count[..., :4] for index in lists]
    assert torch.equal(*counts)
    assert torch.equal(*(index.block_index[..., :4, :] for index in lists))


@pytest.mark.parametrize("kind", BLOCK_SCORES)
@pytest.mark.parametrize("mask", MASKS_TODAY)
def test_block_scores_select_what_the_reference_selects(mask, kind):
    mask = MASKS[mask]
    query, key = tensors(mask)
    arguments = (EstimateInputs(query, key, mask, HEADS, SCALE), BLOCK_SCORES[kind])
    with poisoned_memory():
        index = block_scores_index(*arguments)
    assert_same(index, reference_block_scores.block_scores_index(*arguments))


@pytest.mark.parametrize("mask", MASKS_TODAY)
def test_union_selects_what_the_reference_selects(mask):
    mask = MASKS[mask]
    query, key = tensors(mask)
    arguments = (EstimateInputs(query, key, mask, HEADS, SCALE), UNION)
    with poisoned_memory():
        index = vertical_block_index(*arguments)
    assert_same(index, reference_union.vertical_block_index(*arguments))


@pytest.mark.parametrize("mask", MASKS_TODAY)
def test_x_attention_selects_what_the_reference_selects(mask):
    mask = MASKS[mask]
    query, key = tensors(mask)
    arguments = (EstimateInputs(query, key, mask, HEADS, SCALE), X_ATTENTION)
    with poisoned_memory():
        index = x_attention_index(*arguments)
    assert_same(index, reference_x_attention.x_attention_index(*arguments))


@pytest.mark.parametrize("stride", [1, 4, 32])
def test_x_attention_of_any_stride_and_head_size_select_what_the_reference_selects(stride):
    mask = AttentionMask(query_offset=300, key_mask=padding(2, LENGTH))
    query, key = tensors(mask, head_dim=80)
    rule = XAttentionRule(0.6, stride, 128, 1, 1, 0, max_blocks=4)
    arguments = (EstimateInputs(query, key, mask, [1, 2], SCALE), [rule, rule])
    with poisoned_memory():
        index = x_attention_index(*arguments)
    assert_same(index, reference_x_attention.x_attention_index(*arguments))


@pytest.mark.parametrize("dtype", part_of_today([torch.float16, torch.bfloat16], share=2), ids=str)
def test_lists_in_half_precision_nearly_equal_reference(dtype):
    # Means are rounded to the dtype of the keys, so that near-equal scores may change places.
    mask = MASKS["padding"]
    query, key = tensors(mask, head_dim=80, dtype=dtype)
    given = EstimateInputs(query, key, mask, HEADS[:1], 0.1)
    for estimate, truth, rule in (
        (block_sparse_index, reference.block_sparse_index, BlockSparseRule(2, 64)),
        (block_scores_index, reference_block_scores.block_scores_index, MAX),
        (block_scores_index, reference_block_scores.block_scores_index, TOP_P),
        (vertical_block_index, reference_union.vertical_block_index, UNION[0]),
        (x_attention_index, reference_x_attention.x_attention_index, X_ATTENTION[0]),
    ):
        assert agreement(estimate(given, [rule]), truth(given, [rule])) >= 0.97


def test_scores_taken_in_chunks_give_the_same_lists(monkeypatch):
    mask = MASKS["offset"]
    query, key = tensors(mask)
    given = EstimateInputs(query, key, mask, HEADS[:2], SCALE)
    blocks = given, BLOCK_SCORES["mass"][:2]
    rules, groups = (given, UNION[:2]), (given, X_ATTENTION[:2])
    expected = block_scores_index(*blocks), vertical_block_index(*rules)
    together = x_attention_index(*groups)
    monkeypatch.setattr(list_blocks, "SCORE_BYTES", 1)
    monkeypatch.setattr(x_attention, "GROUP_BYTES", 1)
    assert_same(x_attention_index(*groups), together)
    assert_same(block_scores_index(*blocks), expected[0])
    assert_same(vertical_block_index(*rules), expected[1])


def test_rows_wider_than_a_chunk_are_listed_whole():
    # 2048 scores are one chunk; rules alone are checked here, on scores made up.
    generator = torch.Generator().manual_seed(0)
    query = torch.zeros(1, 1, 64, 16)
    key = torch.zeros(1, 1, 3000 * 64, 16)
    given = EstimateInputs(query, key, AttentionMask(query_offset=2999 * 64), [0], 1.0)
    scores = torch.rand(1, 1, 1, 3000, generator=generator)
    scores[..., 5::7] = 0.25  # ties, of which some are kept
    index = empty_index(query, 1, IndexWidth(max_blocks=1500), [0])
    for rule, limit in (("top_k", 1500), ("row_mass", 1000)):
        rules = device_ints(list_blocks.ListRule(0, limit, 1, 2, 0, 0.99).numbers(), query.device)
        list_blocks.list_blocks(
            index, scores, rule, rules, given,
            rows=(0, 1), first_score_row=2999, repeat=1,
        )  # fmt: skip
        forced = [2999] if rule == "top_k" else [0, 2998, 2999]
        order = torch.sort(scores[0, 0, 0], descending=True, stable=True).indices.tolist()
        best = sorted([*forced, *[i for i in order if i not in forced]][:limit])
        assert int(index.block_count) == limit
        assert index.block_index[0, 0, 0, :limit].tolist() == best


def test_blocks_that_a_row_asked_for_come_before_better_ones_and_count_as_held():
    query, key = torch.zeros(1, 1, 64, 16), torch.zeros(1, 1, 8 * 64, 16)
    given = EstimateInputs(query, key, AttentionMask(query_offset=7 * 64), [0], 1.0)
    scores = torch.tensor([0.5, -0.1, 4.0, 3.0, -0.2, 3.0, 0.0, 1.0]).view(1, 1, 1, 8)
    for share, limit, expected in (
        (0.05, 8, [1, 4, 7]),
        (0.40, 8, [1, 2, 4, 7]),
        (0.50, 8, [1, 2, 3, 4, 7]),  # ties: the smaller of 3 and 5
        (0.95, 8, [1, 2, 3, 4, 5, 7]),
        (1.00, 8, [0, 1, 2, 3, 4, 5, 6, 7]),
        (1.00, 4, [1, 2, 4, 7]),
        (0.50, 2, [4, 7]),
    ):
        index = empty_index(query, 1, IndexWidth(max_blocks=8), [0])
        rules = device_ints(list_blocks.ListRule(0, limit, 0, 1, 0, share).numbers(), query.device)
        list_blocks.list_blocks(
            index, scores, "row_mass", rules, given,
            rows=(0, 1), first_score_row=7, repeat=1,
        )  # fmt: skip
        assert index.block_index[0, 0, 0, : int(index.block_count)].tolist() == expected


@pytest.mark.parametrize("name", ["union", "block_max", "block_top_p", "x_attention"])
def test_a_gpu_takes_the_generated_estimator_of_the_pattern(name, monkeypatch):
    pattern = find_pattern(name)()
    query, key, _ = random_attention(num_queries=130)
    monkeypatch.setattr(lists, "choose_lowering", lambda *_: find_lowering("triton"))
    called = []
    for module in (block_scores, union, x_attention):
        monkeypatch.setattr(module, "list_blocks", lambda *_, **__: called.append(name))
    type(pattern).estimate(EstimateInputs(query, key, AttentionMask(), [0], 1.0), [pattern])
    assert called


LONG = 8197
"""Keys enough for several steps of every loop over runs, keys, distances and splits."""

LONG_RULES = {
    "block_sparse": (block_sparse_index, reference.block_sparse_index, BlockSparseRule(20, 64)),
    "union": (vertical_block_index, reference_union.vertical_block_index, UNION[0]),
    "vertical_slash": (
        vertical_slash_index,
        reference_vertical_slash.vertical_slash_index,
        VerticalSlashRule(1500, 2500),
    ),
}


@pytest.mark.parametrize("name", LONG_RULES)
def test_long_prompts_select_what_the_reference_selects(name):
    estimate, truth, rule = LONG_RULES[name]
    query, key, _ = random_attention(num_queries=70, num_keys=LONG, head_dim=16, seed=5)
    given = EstimateInputs(query * 2, key, AttentionMask(query_offset=LONG - 70), [1], SCALE)
    with poisoned_memory():
        index = estimate(given, [rule])
    assert_same(index, truth(given, [rule]))
