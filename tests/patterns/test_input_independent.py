"""Strided and tri-shape: their cells in closed form."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.errors import PatternValueError
from mpass.lowering.density import density, work_share
from mpass.lowering.index import ALL_BLOCKS, AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.attention import computed_mask
from mpass.patterns.block_max import BlockMax
from mpass.patterns.block_top_p import BlockTopP
from mpass.patterns.strided import Strided
from mpass.patterns.tri_shape import TriShape
from mpass.patterns.union import Union
from mpass.patterns.x_attention import XAttention
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention


def positions(length):
    return torch.arange(length)[:, None], torch.arange(length)


def test_strided_selects_sinks_window_and_block_diagonals():
    query, key, _ = random_attention(num_queries=900)
    cells = Strided(5, 100, stride=192, reach=400).dense_mask(query, key)[0, 0]
    i, j = positions(900)
    far = (i // 64 - j // 64 == 3) | (i // 64 - j // 64 == 6) | (i // 64 == j // 64)
    assert torch.equal(cells, (i >= j) & ((j < 5) | (i - j < 100) | far))


def test_tri_shape_selects_sinks_window_and_dense_last_rows():
    query, key, _ = random_attention(num_queries=500)
    cells = TriShape(5, 100, last_size=70).dense_mask(query, key)[0, 0]
    i, j = positions(500)
    assert torch.equal(cells, (i >= j) & ((j < 5) | (i - j < 100) | (i >= 430)))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_tri_shape_without_causality_reaches_as_far_ahead(padded):
    query, key, _ = random_attention(num_queries=500)
    last = 400 if padded else 500
    key_mask = torch.arange(500)[None] < last if padded else None
    mask = AttentionMask(causal=False, key_mask=key_mask)
    inputs = EstimateInputs(query, key, mask, range(4), 0.1)
    pattern = TriShape(5, 100, last_size=70)
    i, j = positions(500)
    wanted = (j < 5) | ((i - j).abs() < 100) | ((i >= last - 70) & (i < last))
    wanted = wanted & (j < last)
    assert torch.equal(TriShape.select(inputs, [pattern] * 4)[0, 0], wanted)
    given = {"pattern": pattern, "is_causal": False, "key_mask": key_mask}
    cells = mpass.computed_mask(query, key, **given)[0, 0]
    assert not (wanted & ~cells).any()
    assert 0.3 < cells[:, :last].float().mean() < 0.75


def test_tri_shape_counts_last_rows_from_the_last_real_query():
    query, key, _ = random_attention(num_queries=500)
    key_mask = torch.ones(1, 500, dtype=torch.bool)
    key_mask[:, 300:] = False
    cells = mpass.computed_mask(query, key, pattern=TriShape(0, 1, 10), key_mask=key_mask)[0, 0]
    assert (cells[290:300].sum(-1) == torch.arange(291, 301)).all()
    assert (cells[200:256].sum(-1) <= 2 * 64).all()


def test_tri_shape_makes_the_last_rows_dense_however_short_its_lists_are():
    query, key, value = random_attention(num_queries=640)
    pattern = TriShape(0, 1, 64)
    assert pattern.dense_mask(query, key)[0, 0, -64:].sum() == sum(range(577, 641))
    cells = mpass.computed_mask(query, key, pattern=pattern)
    assert torch.equal(
        cells[:, :, -64:], torch.ones(640, 640).tril().bool()[-64:].expand_as(cells[:, :, -64:])
    )
    out = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
    truth = dense_attention(query, key, value, cells, query.shape[-1] ** -0.5)
    assert (out - truth).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize(
    "pattern",
    [
        Union(0.1, 1.0, 0, 0, 1, last_blocks=3, max_blocks=2),
        BlockMax(1.0, 128, 0, 1, 2, max_blocks=2),
        BlockTopP(0.01, 128, 0, 1, 2, max_blocks=2),
        XAttention(0.01, 8, 128, 0, 1, 2, max_blocks=2),
        TriShape(0, 1, 130),
    ],
    ids=str,
)
def test_last_rows_are_dense_at_any_length_in_every_count_of_the_work(pattern):
    query, key, _ = random_attention(num_queries=1000)
    mask = AttentionMask()
    heads = range(query.shape[1])
    index = type(pattern).estimate(
        EstimateInputs(query, key, mask, heads, 0.2), [pattern] * len(heads)
    )
    assert (index.block_count[:, :, -1] == ALL_BLOCKS).all()
    assert (index.block_index[:, :, -1] == 0).all()
    sizes = {"batch": query.shape[0], "num_queries": 1000, "num_keys": 1000}
    cells = computed_mask(index, mask, **sizes)
    causal = torch.ones(1000, 1000).tril().bool()
    assert torch.equal(cells[:, :, -100:], causal[-100:].expand_as(cells[:, :, -100:]))
    assert (cells[:, :, 300:700].float().mean() < 0.25).all()
    share = density(index, mask, **sizes)
    assert torch.allclose(share, cells.sum((2, 3)).double() / causal.sum())
    tiles = float(work_share(index, mask, 1000, 1000))
    assert abs(tiles - float(share.mean())) < 0.1


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Strided(stride=100), "stride is 100; allowed: a multiple of 64"),
        (lambda: Strided(reach=0), "reach is 0"),
        (lambda: TriShape(window_size=0), "window_size is 0"),
        (lambda: TriShape(last_size=-1), "last_size is -1"),
    ],
)
def test_bad_parameter_is_named(make, words):
    with pytest.raises(PatternValueError, match=words):
        make()
