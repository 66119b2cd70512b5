"""Attention under masks that are read at run time equals attention under the very tensors."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from mpass import BlockSparse, BlockTopP
from mpass.lowering.mask_forms import SPANS
from mpass.lowering.recorder import record
from mpass.patterns.base import patterns_as_text
from mpass.patterns.base.masked_attention import BY_DEFAULT, IN_A_SPAN, patterns_from_text
from tests.helpers.toys import EVERY_KEY
from tests.lowering.test_mask_forms import LEFT, MASKS, NONE, K, N, causal, padding, spans, window

SPARSE = {"cpu", "reference"}
ALL_BLOCKS = BlockTopP(1.0)
PER_ROW = "images, differently per row, padded"


def tensors(batch: int):
    generator = torch.Generator().manual_seed(0)
    sizes = [(batch, 4, N, 16), (batch, 2, K, 16), (batch, 2, K, 8)]
    return [torch.randn(*size, generator=generator) for size in sizes]


def run(mask, patterns, *, sinks=None, softcap=0.0, written_out=False):
    query, key, value = tensors(mask.shape[0])
    read = torch.ops.minference.read_mask(mask)
    text = patterns_as_text(patterns)
    with record() as log:
        out = torch.ops.minference.masked_attention(
            *(query, key, value, mask, *read, sinks, text, 0.25, softcap, written_out),
            *(2.0, 0, 3),
        )
    return out, log.calls


def truth(mask, *, sinks=None, softcap=0.0):
    """fp64, step by step, rows that see nothing included."""
    query, key, value = (tensor.double() for tensor in tensors(mask.shape[0]))
    scores = query @ key.repeat_interleave(2, 1).mT * 0.25
    scores = softcap * torch.tanh(scores / softcap) if softcap else scores
    scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if sinks is not None:
        scores = torch.cat(
            [scores, sinks.double().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1
        )
    weights = torch.softmax(scores, -1)[..., :K]
    return (weights @ value.repeat_interleave(2, 1)).float()


@pytest.mark.parametrize("name", sorted(set(MASKS) - {"per head"}))
def test_bool_masks(name):
    mask, form = MASKS[name]
    out, calls = run(mask, [EVERY_KEY] * 4)
    query, key, value = tensors(mask.shape[0])
    # Rows that see nothing are what SDPA makes of them.
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    ran = {call.lowering for call in calls}
    known = name not in ("every key", "padding alone") and form.kind
    if form.kind == SPANS:
        assert ran & SPARSE and "dense" in ran
    else:
        assert ran <= SPARSE if known else ran == {"dense"}
    assert all(call.layer == 3 for call in calls)
    assert all(call.reason for call in calls if call.lowering == "dense")


@pytest.mark.parametrize("hidden", [-1e4, torch.finfo(torch.float32).min])
@pytest.mark.parametrize("name", ["left and right padding", "packed", "every key", PER_ROW])
@pytest.mark.parametrize("softcap", [0.0, 5.0])
def test_finite_masks_keep_the_means_of_rows_that_see_nothing(name, hidden, softcap):
    mask = torch.where(MASKS[name][0], 0.0, hidden)
    out, _ = run(mask, [EVERY_KEY, EVERY_KEY, ALL_BLOCKS, ALL_BLOCKS], softcap=softcap)
    # -1e4 and a score are rounded together in fp32.
    torch.testing.assert_close(out, truth(mask, softcap=softcap), atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("written_out", [True, False])
def test_rows_of_infinities_are_as_the_program_spells_them(written_out):
    seen = MASKS["left and no padding"][0]
    mask = torch.where(seen, 0.0, -torch.inf)
    out, _ = run(mask, [EVERY_KEY] * 4, written_out=written_out)
    expected = truth(mask) if written_out else truth(mask).nan_to_num(0.0)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4, equal_nan=True)


def test_sinks():
    sinks = torch.randn(4)
    mask = MASKS["window"][0]
    for tensor in (mask, ~mask):
        out, _ = run(tensor, [EVERY_KEY] * 4, sinks=sinks)
        torch.testing.assert_close(out, truth(tensor, sinks=sinks), atol=1e-5, rtol=1e-4)


def test_no_index_crosses_a_segment():
    """A pattern that keeps little keeps it within the document."""
    mask = MASKS["packed"][0]
    _, calls = run(mask, [EVERY_KEY] * 4)
    assert [(call.num_queries, call.num_keys) for call in calls] == [(60, 60), (40, 40), (50, 50)]


@pytest.mark.parametrize("hidden", [NONE, LEFT])
def test_a_long_prefix_that_sees_itself_is_sparse_where_the_pattern_allows_it(hidden):
    mask = spans(0, (0, 140)) & padding(hidden)
    out, calls = run(mask, [BlockSparse(1 << 20)] * 4)
    query, key, value = tensors(1)
    expected = F.scaled_dot_product_attention(query, key, value, mask, scale=0.25, enable_gqa=True)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)
    assert [(call.num_queries, call.num_keys) for call in calls] == [(10, 150), (140, 140)]
    assert all(call.lowering in SPARSE for call in calls)


def test_patterns_that_nobody_named_leave_what_sees_both_ways_dense():
    """They were chosen for causal attention: a mask of another kind is found out in the call."""
    own = patterns_as_text([BlockSparse(1 << 20)] * 4)
    for mask, reasons in (
        (padding(LEFT), [BY_DEFAULT]),
        (spans(0, (0, 140)), ["", IN_A_SPAN]),
        (causal(), [""]),
    ):
        mask = mask.expand(1, 1, N, K)
        read = torch.ops.minference.read_mask(mask)
        given = (*tensors(1), mask, *read, None, own, 0.25, 0.0, False, 2.0, 0, 3)
        with record() as log:
            out = torch.ops.minference.masked_attention(*given, causal_only=True)
        assert [call.reason for call in log.calls] == reasons
        torch.testing.assert_close(out, truth(mask), atol=1e-5, rtol=1e-4)


def test_a_span_under_a_window_reads_no_key_before_it():
    mask = spans(0, (100, 130)) & window(0, 40).logical_or(spans(0, (100, 130)) & ~causal())
    _, calls = run(mask, [EVERY_KEY] * 4)
    assert [(call.num_queries, call.num_keys) for call in calls] == [(150, 150), (30, 69)]
    assert calls[1].reason == IN_A_SPAN


def test_patterns_go_through_text():
    own = (EVERY_KEY, ALL_BLOCKS, EVERY_KEY, BlockTopP(0.5))
    assert patterns_from_text(patterns_as_text(own)) == own
