"""Every registered pattern: it computes what it says, and no less than it selects."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpass
from mpass.errors import PatternValueError, ShapeError, UnknownPatternError
from mpass.lowering.cpu.support import best_instruction_set, estimate_spec
from mpass.lowering.index import BLOCK
from mpass.patterns.base import find_pattern, registered_patterns
from tests.helpers.rotation import part_of_today
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention

PATTERNS = [
    pattern for _, cls in sorted(registered_patterns().items()) for pattern in cls.examples()
]


@st.composite
def attentions(draw):
    kv_heads = draw(st.sampled_from([1, 2, 4]))
    group = draw(st.sampled_from([1, 2, 4]).filter(lambda g: g * kv_heads <= 8))
    num_queries = draw(st.integers(1, 700))
    offset = draw(st.sampled_from([0, 0, 1, 64, 100]))
    return random_attention(
        batch=draw(st.integers(1, 3)),
        heads=kv_heads * group,
        kv_heads=kv_heads,
        num_queries=num_queries,
        num_keys=num_queries + offset,
        head_dim=draw(st.sampled_from([16, 64])),
        value_dim=draw(st.sampled_from([16, 64])),
        seed=draw(st.integers(0, 10**6)),
    )


@pytest.fixture(scope="module")
def exact_estimates():
    """fp32 products in estimators: where a score is next to a threshold, rounding would decide."""

    def exact(query):
        return replace(estimate_spec(query), instruction_set=best_instruction_set(torch.float32))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpass.lowering.cpu.estimators.estimate_spec", exact)
        yield


@pytest.mark.usefixtures("exact_estimates")
@pytest.mark.parametrize("pattern", part_of_today(PATTERNS, share=3), ids=str)
@settings(max_examples=12)
@given(tensors=attentions())
def test_pattern_computes_dense_attention_under_its_computed_mask(pattern, tensors):
    query, key, value = tensors
    offset = key.shape[2] - query.shape[2]
    out = mpass.sparse_attention(
        query, key, value, pattern=pattern, enable_gqa=True, query_offset=offset
    )
    cells = mpass.computed_mask(query, key, pattern=pattern, query_offset=offset)
    truth = dense_attention(query, key, value, cells, query.shape[-1] ** -0.5)
    assert (out - truth).abs().max() < TOLERANCE[torch.float32]

    positions = torch.arange(query.shape[2]) + offset
    causal = positions[:, None] >= torch.arange(key.shape[2])
    assert not (cells & ~causal).any(), "a key after its query is computed"
    assert cells.any(-1).all(), "a query sees nothing"
    selected = pattern.dense_mask(query, key)
    missed = selected & ~cells
    # The estimators of two lowerings may order near-equal scores differently; where these stand at
    # a threshold, one head has another block than the rule chose, of its few.
    at_a_threshold = (missed.flatten(2).any(-1)).sum() <= 1 and missed.sum() <= BLOCK**2
    few = missed.sum() <= 0.002 * selected.sum()
    assert few or at_a_threshold, "a selected key is not computed"

    share = mpass.density(query, key, pattern=pattern, query_offset=offset)
    counted = cells.sum((2, 3)).double() / causal.sum()
    assert torch.equal(share, counted) or torch.allclose(share, counted, rtol=1e-12)


DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize(
    ("pattern", "dtype"), part_of_today(itertools.product(PATTERNS, DTYPES), share=4), ids=str
)
def test_pattern_serves_padding_windows_and_dtypes(pattern, dtype):
    query, key, value = random_attention(batch=3, num_queries=300, dtype=dtype)
    key_mask = torch.ones(3, 300, dtype=torch.bool)
    key_mask[0, :70] = False
    key_mask[1, -65:] = False
    key_mask[2] = False
    settings = {"key_mask": key_mask, "window": 130}
    out = mpass.sparse_attention(
        query, key, value, pattern=pattern, enable_gqa=True, **settings
    ).double()
    cells = mpass.computed_mask(query, key, pattern=pattern, **settings)
    truth = dense_attention(query, key, value, cells, query.shape[-1] ** -0.5)
    assert (out - truth).abs().max() < TOLERANCE[dtype]
    assert (out[2] == 0).all(), "a row without keys must be zero"
    distance = torch.arange(300)[:, None] - torch.arange(300)
    assert not (cells & ((distance < 0) | (distance >= 130))).any()
    assert not (cells & ~key_mask[:, None, None, :]).any()


@pytest.mark.parametrize(
    "pattern", part_of_today([p for p in PATTERNS if p.bidirectional], share=2), ids=str
)
def test_bidirectional_pattern_sees_later_keys(pattern):
    query, key, value = random_attention(num_queries=200, num_keys=330)
    out = mpass.sparse_attention(
        query, key, value, pattern=pattern, enable_gqa=True, is_causal=False
    )
    cells = mpass.computed_mask(query, key, pattern=pattern, is_causal=False)
    truth = dense_attention(query, key, value, cells, query.shape[-1] ** -0.5)
    assert (out - truth).abs().max() < TOLERANCE[torch.float32]
    assert cells.any(-1).all()
    assert torch.triu(cells, 1).any()


def test_full_budgets_compute_every_causal_key():
    query, key, _ = random_attention(num_queries=300)
    for pattern in (
        mpass.Dense(),
        mpass.AShape(0, 300),
        mpass.VerticalSlash(1, 300),
        mpass.BlockSparse(5),
    ):
        assert (mpass.density(query, key, pattern=pattern) == 1).all(), str(pattern)


def test_a_shape_selects_sinks_and_window():
    query, key, _ = random_attention(num_queries=200)
    cells = mpass.AShape(5, 20).dense_mask(query, key)[0, 0]
    i, j = torch.arange(200)[:, None], torch.arange(200)
    assert torch.equal(cells, (i >= j) & ((i - j < 20) | (j < 5)))


def test_vertical_slash_follows_the_rule_of_the_paper():
    """Written out once more, by loops: last 64 queries, forced 30 columns and 100 diagonals."""
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=260, head_dim=16)
    n, rows = 260, range(260 - 64, 260)
    column, diagonal = torch.zeros(n), torch.zeros(n)
    for i in rows:
        weights = torch.softmax(query[0, 0, i] @ key[0, 0, : i + 1].T * 0.25, -1)
        for j in range(i + 1):
            column[j] += weights[j]
            diagonal[i - j] += weights[j]
    column[:30] = torch.inf
    diagonal[:100] = torch.inf
    columns = set(column.topk(45).indices.tolist())
    diagonals = set(diagonal.topk(120).indices.tolist())
    cells = mpass.VerticalSlash(45, 120).dense_mask(query, key)[0, 0]
    expected = torch.tensor(
        [[j <= i and (j in columns or i - j in diagonals) for j in range(n)] for i in range(n)]
    )
    assert torch.equal(cells, expected)


def test_block_sparse_keeps_the_best_mean_pooled_blocks():
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=512, head_dim=16)
    pooled_query = query[0, 0].view(8, 64, 16).mean(1)
    pooled_key = key[0, 0].view(8, 64, 16).mean(1)
    cells = mpass.BlockSparse(top_k=3).dense_mask(query, key)[0, 0]
    for i in range(8):
        scores = pooled_key[: i + 1] @ pooled_query[i]
        scores[i] = torch.inf
        best = set(scores.topk(min(3, i + 1)).indices.tolist())
        kept = {j for j in range(8) if cells[i * 64 + 63, j * 64 : j * 64 + 64].any()}
        assert kept == best


def test_pattern_cost_grows_slower_than_dense():
    for pattern in (mpass.AShape(), mpass.VerticalSlash(), mpass.BlockSparse()):
        length, dim = sorted(pattern.cost().free_symbols, key=str, reverse=True)
        ratio = pattern.cost() / mpass.Dense().cost()
        assert float(ratio.subs({length: 2**20, dim: 128})) < 0.6


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: mpass.AShape(-1, 10), "sink_size is -1"),
        (lambda: mpass.AShape(1, 0), "window_size is 0"),
        (lambda: mpass.VerticalSlash(0, 5), "vertical_size is 0"),
        (lambda: mpass.VerticalSlash(5, 2.5), "slash_size is 2.5"),
        (lambda: mpass.BlockSparse(0), "top_k is 0"),
        (lambda: mpass.BlockSparse(1, 65), "block_size is 65"),
        (lambda: mpass.BlockSparse(True), "top_k is True"),
    ],
)
def test_bad_parameter_is_named(make, words):
    with pytest.raises(PatternValueError, match=words):
        make()


def test_unknown_pattern_names_the_nearest():
    with pytest.raises(UnknownPatternError, match="did you mean 'vertical_slash'"):
        find_pattern("vertical_slsh")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"enable_gqa": False}, "enable_gqa=True"),
        ({"query_offset": 5}, "query_offset 5"),
        ({"window": -1}, "window is -1"),
        ({"is_causal": False, "pattern": "vertical_slash"}, "causal attention only"),
        ({"key_mask": torch.ones(1, 3, dtype=torch.bool)}, "key_mask"),
    ],
)
def test_bad_call_is_refused_in_words(change, words):
    query, key, value = random_attention()
    with pytest.raises(ShapeError, match=words):
        mpass.sparse_attention(
            query, key, value, **({"pattern": "a_shape", "enable_gqa": True} | change)
        )


def test_shapes_that_make_no_attention_are_refused():
    query, key, value = random_attention(heads=3, kv_heads=2)
    with pytest.raises(ShapeError, match="3 query heads do not divide"):
        mpass.sparse_attention(query, key, value, pattern="dense", enable_gqa=True)
    with pytest.raises(ShapeError, match="pass query_offset"):
        mpass.sparse_attention(query[:, :2, :9], key, value, pattern="dense")
    with pytest.raises(ShapeError, match="expected"):
        mpass.sparse_attention(query[0], key, value, pattern="dense")
