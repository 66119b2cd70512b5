"""Strided and tri-shape: their cells in closed form."""

from __future__ import annotations

import pytest
import torch
from mpass.patterns.strided import Strided
from mpass.patterns.tri_shape import TriShape

import mpass
from mpass.errors import PatternValueError
from tests.truth import random_attention


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


def test_tri_shape_counts_last_rows_from_the_last_real_query():
    query, key, _ = random_attention(num_queries=500)
    key_mask = torch.ones(1, 500, dtype=torch.bool)
    key_mask[:, 300:] = False
    cells = mpass.computed_mask(query, key, pattern=TriShape(0, 1, 10), key_mask=key_mask)[0, 0]
    assert (cells[290:300].sum(-1) == torch.arange(291, 301)).all()
    assert (cells[200:256].sum(-1) <= 2 * 64).all()


def test_tri_shape_reaches_as_far_back_as_its_lists_hold():
    query, key, _ = random_attention(num_queries=640)
    cells = TriShape(0, 1, 64, max_blocks=4).dense_mask(query, key)[0, 0]
    assert cells[-1, 384:].all()
    assert not cells[-1, :384].any()


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Strided(stride=100), "stride is 100; allowed: a multiple of 64"),
        (lambda: Strided(reach=0), "reach is 0"),
        (lambda: TriShape(window_size=640, max_blocks=5), "max_blocks is 5; allowed: 11 or more"),
        (lambda: TriShape(last_size=-1), "last_size is -1"),
    ],
)
def test_bad_parameter_is_named(make, words):
    with pytest.raises(PatternValueError, match=words):
        make()
