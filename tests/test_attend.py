"""`mpass.attend` is what a compiled model computes, called by hand with a pattern per head."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from torch import Tensor

import mpass
from mpass.config.heads import read_groups
from mpass.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GradientError,
    MpassError,
    OptionValueError,
    PatternValueError,
    ShapeError,
    TensorTypeError,
    UnknownPatternError,
)
from mpass.lowering.recorder import record
from mpass.patterns.base import registered_patterns
from tests.helpers.toys import EVERY_KEY
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention

PATTERNS = [
    pattern for _, cls in sorted(registered_patterns().items()) for pattern in cls.examples()
]
MIXED = ["union", "a_shape(64, 128)", mpass.Dense(), mpass.VerticalSlash(40, 70)]
"""Of four heads: lists and diagonals, estimated and not, objects and text."""

WORDS = {
    "whole": {},
    "chunk": {"offset": 100},
    "chunk and window": {"offset": 64, "window": 90},
    "softcap and sinks": {"offset": 37, "softcap": 5.0, "sinks": True},
    "padding": {"padding": True},
    "keys after the queries": {"offset": 64, "after": 150},
}
"""What is asked of an attention beside its patterns."""


def tensors(offset=0, after=0, dtype=torch.float32, num_queries=300):
    """Grouped heads, in a batch of two, values of another size."""
    return random_attention(
        batch=2,
        num_queries=num_queries,
        num_keys=offset + num_queries + after,
        value_dim=16,
        dtype=dtype,
    )


def arguments(num_keys, *, offset=0, window=0, softcap=0.0, sinks=False, padding=False, after=0):
    """Keyword arguments of `attend`."""
    mask = torch.arange(num_keys) >= torch.tensor([[0], [70]])
    return {
        "query_offset": offset,
        "window": window,
        "softcap": softcap,
        "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0]) if sinks else None,
        "key_mask": mask if padding else None,
    }


def compiled(query, key, value, heads, dense_above, given):
    """The same attention in a graph that the backend rewrites."""

    def attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        out: Tensor = torch.ops.minference.attention(
            *(query, key, value, given["key_mask"], given["sinks"], given["query_offset"]),
            *(given["window"], True, query.shape[-1] ** -0.5, given["softcap"]),
        )
        return out

    options = {
        "config": mpass.SparseConfig(layers={0: heads}),
        "dense_above": dense_above,
        "inner_backend": "eager",
        "min_seq_len": 128,
    }
    attention.layer_idx = 0  # type: ignore[attr-defined]
    torch._dynamo.reset()
    module = Layer(attention)
    out = torch.compile(module, backend="minference", fullgraph=True, options=options)(
        query, key, value
    )
    return out, mpass.last_report().sites[0]


class Layer(torch.nn.Module):
    """A function as the attention of layer 0."""

    layer_idx = 0

    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *inputs):
        return self.attention(*inputs)


@pytest.mark.parametrize("words", ["whole", "chunk"])
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@torch.no_grad()
def test_every_pattern_is_that_of_the_compiled_path(pattern, words):
    inputs = tensors(WORDS[words].get("offset", 0))
    given = arguments(inputs[1].shape[2], **WORDS[words])
    expected, _ = compiled(*inputs, [pattern] * 4, 2.0, given)
    out = mpass.attend(*inputs, patterns=pattern, dense_above=2.0, **given)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dense_above", [0.6, 2.0])
@pytest.mark.parametrize("words", WORDS)
@torch.no_grad()
def test_mixed_heads_are_those_of_the_compiled_path(words, dense_above):
    inputs = tensors(WORDS[words].get("offset", 0), WORDS[words].get("after", 0))
    given = arguments(inputs[1].shape[2], **WORDS[words])
    expected, site = compiled(*inputs, MIXED, dense_above, given)
    assert site.status == "sparse"
    out = mpass.attend(*inputs, patterns=MIXED, dense_above=dense_above, **given)
    torch.testing.assert_close(out, expected, atol=2e-6, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_heads_attend_to_what_their_own_patterns_select(dtype):
    query, key, value = tensors(100, dtype=dtype)
    out = mpass.attend(query, key, value, patterns=MIXED, query_offset=100, dense_above=1.0)
    masks = [
        mpass.computed_mask(query, key, pattern=pattern, query_offset=100)[:, head : head + 1]
        for head, pattern in enumerate(MIXED)
    ]
    truth = dense_attention(query, key, value, torch.cat(masks, 1), 32**-0.5)
    torch.testing.assert_close(out.double(), truth, atol=TOLERANCE[dtype], rtol=0)


def test_chunks_of_an_input_independent_pattern_are_one_call():
    query, key, value = tensors(num_queries=500)
    whole = mpass.attend(query, key, value, patterns="a_shape(64, 128)", dense_above=1.0)
    parts = []
    for start, stop in ((0, 130), (130, 132), (132, 448), (448, 500)):
        rows = query[:, :, start:stop]
        parts.append(
            mpass.attend(
                *(rows, key, value),
                patterns="a_shape(64, 128)",
                query_offset=start,
                dense_above=1.0,
            )
        )
    torch.testing.assert_close(torch.cat(parts, 2), whole, atol=1e-6, rtol=0)


@pytest.mark.parametrize("strides", ["tokens first", "half of a row", "rows reversed in memory"])
def test_views_of_any_strides_are_taken(strides):
    query, key, value = tensors(64)
    if strides == "tokens first":
        views = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (query, key, value)]
    elif strides == "half of a row":
        views = [torch.cat([t, t], -1)[..., : t.shape[-1]] for t in (query, key, value)]
    else:
        views = [t.mT.contiguous().mT for t in (query, key, value)]
    assert not any(view.is_contiguous() for view in views)
    given = {"patterns": MIXED, "query_offset": 64, "dense_above": 1.0}
    out = mpass.attend(*views, **given)
    torch.testing.assert_close(out, mpass.attend(query, key, value, **given), atol=2e-6, rtol=0)
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad, contextlib.nullcontext])
def test_every_mode_without_gradients_is_served(mode):
    with mode():
        query, key, value = tensors()
        out = mpass.attend(query, key, value, patterns=MIXED, dense_above=1.0)
    again = mpass.attend(query.clone(), key.clone(), value.clone(), patterns=MIXED, dense_above=1.0)
    assert torch.equal(out, again)


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("patterns", [MIXED, tuple(MIXED), "union", mpass.AShape(64, 128)], ids=str)
@pytest.mark.parametrize("backend", ["aot_eager", "minference"])
def test_a_compiled_function_may_call_it(backend, patterns, recwarn):
    def call(query, key, value, sinks):
        return mpass.attend(
            *(query, key, value),
            patterns=patterns,
            query_offset=key.shape[2] - query.shape[2],
            sinks=sinks,
            dense_above=1.0,
            layer=2,
        )

    sinks = torch.zeros(4)
    options = {"options": {"inner_backend": "eager"}} if backend == "minference" else {}
    function = torch.compile(call, backend=backend, fullgraph=True, dynamic=True, **options)
    for offset in (0, 100):
        inputs = (*tensors(offset), sinks)
        torch.testing.assert_close(function(*inputs), call(*inputs), atol=1e-6, rtol=0)
    assert not [str(one.message) for one in recwarn if "lru_cache" in str(one.message)]


def test_sparse_where_it_pays_and_dense_where_not():
    query, key, value = tensors()
    with record() as log:
        all_keys = mpass.attend(query, key, value, patterns=EVERY_KEY, layer=5)
        mpass.attend(query, key, value, patterns=EVERY_KEY, dense_above=1.0, layer=6)
    assert [(call.layer, call.lowering == "dense") for call in log.calls] == [(5, True), (6, False)]
    assert log.calls[0].reason
    cells = torch.ones(300, 300, dtype=torch.bool).tril()
    truth = dense_attention(query, key, value, cells, 32**-0.5)
    torch.testing.assert_close(all_keys.double(), truth, atol=1e-5, rtol=0)


@pytest.mark.parametrize("patterns", ["dense", [EVERY_KEY] * 4])
def test_decoding_and_layers_without_sparse_heads_are_not_estimated(patterns, monkeypatch):
    monkeypatch.setattr("mpass.functional.attend_heads", None)  # is not called
    num_queries = 300 if patterns == "dense" else 1
    query, key, value = tensors(40, num_queries=num_queries)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])
    out = mpass.attend(
        query, key, value, patterns=patterns, query_offset=40, softcap=4.0, sinks=sinks
    )
    scores = query.double() @ key.double().repeat_interleave(2, 1).mT * 32**-0.5
    cells = torch.arange(num_queries)[:, None] + 40 >= torch.arange(40 + num_queries)
    scores = (4 * torch.tanh(scores / 4)).masked_fill(~cells, -torch.inf)
    column = sinks.double().view(1, 4, 1, 1).expand(2, 4, num_queries, 1)
    weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    truth = weights @ value.double().repeat_interleave(2, 1)
    torch.testing.assert_close(out.double(), truth, atol=1e-5, rtol=0)


def test_patterns_of_a_layer_are_grouped_once():
    query, key, value = tensors()
    mpass.attend(query, key, value, patterns=MIXED)
    before = read_groups.cache_info()
    mpass.attend(query, key, value, patterns=list(MIXED))
    after = read_groups.cache_info()
    assert (after.hits - before.hits, after.misses - before.misses) == (1, 0)


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"patterns": ["union"] * 3}, ShapeError, "layer 7: 3 patterns for 4 query heads"),
        ({"patterns": []}, ShapeError, "0 patterns for 4 query heads"),
        ({"patterns": ["union", "a_shap", "union", "union"]}, UnknownPatternError, "a_shape"),
        ({"patterns": "a_shape(-1)"}, PatternValueError, "a_shape"),
        ({"patterns": mpass.AShape}, OptionValueError, r"AShape\(\)"),
        ({"patterns": {0: "union"}}, OptionValueError, "text such as"),
        ({"patterns": [3, 4, 5, 6]}, OptionValueError, "text such as"),
        ({"query_offset": None}, ShapeError, "pass query_offset"),
        ({"query_offset": 65}, ShapeError, "0 to 64"),
        ({"query_offset": torch.tensor(64)}, ArgumentError, "query_offset is a Tensor"),
        ({"window": torch.tensor(64)}, ArgumentError, "window is a Tensor"),
        ({"window": -1}, ShapeError, "window is -1"),
        ({"scale": torch.tensor(0.1)}, ArgumentError, "scale is a Tensor"),
        ({"softcap": -1.0}, ArgumentError, "softcap is -1.0"),
        ({"softcap": None}, ArgumentError, "softcap is None; allowed: 0 for none"),
        ({"dense_above": -0.5}, ArgumentError, "dense_above is -0.5"),
        ({"layer": "model.layers.3"}, ArgumentError, "the number of a layer"),
        ({"sinks": torch.zeros(2)}, ShapeError, r"a float per query head, \[4\]"),
        ({"sinks": torch.zeros(4, dtype=torch.int32)}, ShapeError, "int32"),
        ({"sinks": [0.0] * 4}, TensorTypeError, "sinks is a list"),
        ({"sinks": torch.zeros(4, device="meta")}, DeviceError, "for sinks"),
        ({"sinks": torch.zeros(4, requires_grad=True)}, GradientError, "sinks"),
        ({"key_mask": torch.ones(2, 300, dtype=torch.bool)}, ShapeError, "key_mask"),
        (
            {"key_mask": torch.ones(2, 364, dtype=torch.bool, device="meta")},
            DeviceError,
            "for key_mask",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_wrong_arguments_are_named(given, error, words):
    query, key, value = tensors(64)
    given = {"patterns": "union", "query_offset": 64, "layer": 7} | given
    with pytest.raises(error, match=words):
        mpass.attend(query, key, value, **given)
    assert issubclass(error, MpassError)


def test_wrong_tensors_are_named():
    query, key, value = tensors()
    with pytest.raises(DtypeError, match="float8"):
        mpass.attend(query.to(torch.float8_e4m3fn), key, value, patterns="union")
    with pytest.raises(DtypeError, match="bfloat16"):
        mpass.attend(query, key.bfloat16(), value, patterns="union")
    with pytest.raises(TensorTypeError, match="query"):
        mpass.attend(np.zeros((1, 4, 64, 16), np.float32), key, value, patterns="union")
    with pytest.raises(ShapeError, match="3 query heads do not divide"):
        mpass.attend(query[:, :3], key, value, patterns="union")


def test_a_head_that_would_lose_too_much_keeps_every_key():
    query, key, value = random_attention(num_queries=300)
    cells = torch.ones(300, 300, dtype=torch.bool).tril()[None, None]
    truth = dense_attention(query, key, value, cells, query.shape[-1] ** -0.5)
    given = {"patterns": "a_shape(1, 64)", "dense_above": 2.0}
    out = mpass.attend(query, key, value, **given)
    assert not torch.allclose(out.double(), truth, atol=1e-3)
    guarded = mpass.attend(query, key, value, most_lost=0.2, **given)
    assert torch.allclose(guarded.double(), truth, atol=1e-4)
    given["patterns"] = "a_shape(16, 200)"
    out = mpass.attend(query, key, value, **given)
    assert torch.equal(mpass.attend(query, key, value, most_lost=0.9, **given), out)


@pytest.mark.parametrize("given", [{"most_lost": 0}, {"most_lost": 1.5}, {"most_lost": True}])
def test_a_share_that_is_none_is_refused(given):
    with pytest.raises(ArgumentError, match="most_lost"):
        mpass.attend(*random_attention(num_queries=64), patterns="dense", **given)
    with pytest.raises(ArgumentError, match="return_lse"):
        mpass.attend(
            *random_attention(num_queries=64), patterns="dense", most_lost=0.5, return_lse=True
        )
