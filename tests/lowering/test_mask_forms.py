"""Masks read at run time: what is said of a mask is true of every cell, whatever the mask is."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpass.lowering.mask_forms import (
    CAUSAL,
    EVERY,
    SEGMENTS,
    SPANS,
    UNKNOWN,
    MaskForm,
    ReadMask,
    read_mask,
)

N, K = 150, 200


def grid(offset: int) -> tuple[Tensor, Tensor]:
    """Positions of the queries [Nq, 1] and of the keys [Nk]."""
    return torch.arange(N)[:, None] + offset, torch.arange(K)


def causal(offset: int = 0) -> Tensor:
    position, key = grid(offset)
    return (key <= position)[None, None]


def window(offset: int, size: int) -> Tensor:
    position, key = grid(offset)
    return causal(offset) & (position - key < size)


def packed(offset: int, *ends: int) -> Tensor:
    position, key = grid(offset)
    bounds = torch.tensor(ends)
    documents = [torch.bucketize(each, bounds, right=True) for each in (position, key)]
    return causal(offset) & (documents[0] == documents[1])


def spans(offset: int, *ends: tuple[int, int]) -> Tensor:
    """Causal, but the queries from one position to another see all of these positions."""
    position, key = grid(offset)
    seen = causal(offset)
    for start, stop in ends:
        inside = [(each >= start) & (each < stop) for each in (position, key)]
        seen = seen | inside[0] & inside[1]
    return seen


def cell(row: int, key: int) -> Tensor:
    mask = torch.zeros(1, 1, N, K, dtype=torch.bool)
    mask[..., row, key] = True
    return mask


def padding(*hidden: slice) -> Tensor:
    mask = torch.ones(len(hidden), 1, 1, K, dtype=torch.bool)
    for row, where in zip(mask, hidden, strict=True):
        row[..., where] = False
    return mask


LEFT, RIGHT, NONE = slice(0, 30), slice(120, K), slice(0, 0)

MASKS = {
    "causal": (causal(), MaskForm(CAUSAL)),
    "after a cached prefix": (causal(50), MaskForm(CAUSAL, 50)),
    "offset within a static cache": (causal(17), MaskForm(CAUSAL, 17)),
    "left and no padding": (
        causal() & padding(LEFT, NONE),
        MaskForm(CAUSAL, padded=True, empty=True),
    ),
    "left and right padding": (
        causal() & padding(LEFT, RIGHT),
        MaskForm(CAUSAL, padded=True, empty=True),
    ),
    "holes": (causal(20) & padding(slice(40, 50)), MaskForm(CAUSAL, 20, padded=True)),
    "window": (window(0, 40), MaskForm(CAUSAL, window=40)),
    "window of one": (window(3, 1), MaskForm(CAUSAL, 3, window=1)),
    "window after a prefix, padded": (
        window(50, 70) & padding(LEFT, NONE),
        MaskForm(CAUSAL, 50, 70, padded=True),
    ),
    "window that hides nothing": (window(0, N), MaskForm(CAUSAL)),
    "packed": (packed(0, 60, 100), MaskForm(SEGMENTS)),
    "packed in a long prompt": (packed(50, 70, 71, 190), MaskForm(SEGMENTS, 50)),
    "packed, differently per row": (
        torch.cat([packed(0, 60), packed(0, 100, 120)]),
        MaskForm(SEGMENTS),
    ),
    "every key": (torch.ones(1, 1, N, K, dtype=torch.bool), MaskForm(EVERY)),
    "padding alone": (
        padding(LEFT, RIGHT).expand(-1, -1, N, -1),
        MaskForm(EVERY, padded=True),
    ),
    "nothing": (torch.zeros(1, 1, N, K, dtype=torch.bool), MaskForm()),
    "queries past the last key": (causal(60), MaskForm()),
    "not their own position": (causal(-1), MaskForm()),
    "anti-causal": (~causal(), MaskForm()),
    "per head": (torch.cat([causal(), causal(50)], 1), MaskForm()),
    "prefix that sees itself": (spans(0, (0, 40)), MaskForm(SPANS)),
    "images": (spans(0, (20, 50), (90, 120)), MaskForm(SPANS)),
    "images side by side, a cached prefix before them": (
        spans(50, (60, 90), (90, 121), (198, 200)),
        MaskForm(SPANS, 50),
    ),
    "images in a static cache": (spans(17, (30, 80)), MaskForm(SPANS, 17)),
    "images under a window": (
        spans(0, (20, 50), (90, 120)) & (grid(0)[0] - grid(0)[1] < 40),
        MaskForm(SPANS, window=40),
    ),
    "images, differently per row, padded": (
        torch.cat([spans(0, (40, 70)), spans(0, (0, 60))]) & padding(LEFT, RIGHT),
        MaskForm(SPANS, padded=True, empty=True),
    ),
    "padding within a span": (
        spans(0, (0, 60)) & padding(slice(0, 30)),
        MaskForm(SPANS, padded=True),
    ),
    "a span without its last key": (spans(0, (20, 50), (50, 51)) & ~cell(30, 49), MaskForm()),
    "images without a window of their own": (
        window(0, 20) | spans(0, (30, 80)) & (grid(0)[1] >= 30) & (grid(0)[0] < 80),
        MaskForm(),
    ),
}


def meant(read: ReadMask) -> Tensor:
    """The cells [B, 1, Nq, Nk] that are seen by what was read."""
    key = torch.arange(read.key_mask.shape[1])
    seen = (key >= read.first[..., None]) & (key <= read.last[..., None])
    return (seen & read.key_mask[:, None])[:, None]


def check(read: ReadMask, mask: Tensor) -> None:
    """What was read of a mask that is True for seen is what the mask is."""
    if read.form.kind == UNKNOWN:
        return
    assert torch.equal(meant(read), mask)
    assert read.form.empty == (not mask.any(-1).all())
    if read.form.kind not in (EVERY, SPANS):
        assert torch.equal(read.last, (torch.arange(N) + read.form.offset).expand_as(read.last))
    assert all(bool((each.diff() >= 0).all()) for each in (read.first, read.last))
    if read.form.kind == CAUSAL:
        inside = torch.arange(N)[:, None] + read.form.offset - torch.arange(K)
        width = read.form.window
        assert not mask[..., inside >= width].any() if width else not read.first.any()


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("hidden", [None, -1e4, torch.finfo(torch.float32).min, -torch.inf])
def test_form_of_a_mask(name, hidden):
    mask, form = MASKS[name]
    tensor = mask if hidden is None else torch.where(mask, 0.0, hidden)
    read = read_mask(tensor)
    assert read.form == form
    assert MaskForm.from_tensor(read.form.tensor()) == form
    check(read, mask)


@given(
    st.sampled_from(sorted(MASKS)),
    st.lists(st.tuples(st.integers(0, N - 1), st.integers(0, K - 1)), min_size=1, max_size=3),
    st.booleans(),
)
def test_a_mask_with_any_cell_changed_is_read_as_it_is(name, cells, additive):
    mask = MASKS[name][0].clone()
    for row, key in cells:
        mask[-1, :, row, key] ^= True
    check(read_mask(torch.where(mask, 0.0, -torch.inf) if additive else mask), mask)


@pytest.mark.parametrize("value", [-1.0, 1.0, -8999.0, torch.nan, torch.inf])
@pytest.mark.parametrize("place", [(0, 0), (70, 3), (149, 149), (80, 190)])
def test_an_additive_mask_with_a_bias_has_no_form(value, place):
    mask = torch.where(causal(), 0.0, -torch.inf)
    mask[0, 0][place] = value
    assert read_mask(mask).form.kind == UNKNOWN


def test_batch_rows_of_one_memory_are_read_once():
    mask = causal().expand(3, 2, N, K)
    read = read_mask(mask)
    assert read.form == MaskForm(CAUSAL)
    assert read.key_mask.shape == (3, K)
    assert read.first.shape == read.last.shape == (3, N)
