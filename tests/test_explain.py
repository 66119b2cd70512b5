"""mpass.explain: every reason to stay dense by name and source line, costs, breaks, saving."""

from __future__ import annotations

import inspect
import json

import pytest
import torch
from mpass.lowering.record import record
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.explanation import explain
from tests.toys import Attention, Decoder

N = 192
OPTIONS = {"min_seq_len": 128}


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def qkv(*, heads=4, kv_heads=4, queries=N, keys=N, dim=16, dtype=torch.float32, grad=False):
    query = torch.randn(1, heads, queries, dim, dtype=dtype, requires_grad=grad)
    key, value = (torch.randn(1, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
    return query, key, value


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def bidirectional(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


def with_dropout(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.25)


def with_random_mask(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q.mean(1)[0] @ k.mean(1)[0].T > 0)


def with_bias(q, k, v):
    bias = -(torch.arange(N)[:, None] - torch.arange(N)).abs() * 0.1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def grouped_without_gqa(q, k, v):
    k, v = k.expand(-1, 1, -1, -1), v.expand(-1, 1, -1, -1)
    return F.scaled_dot_product_attention(q.flatten(0, 1)[:, None], k, v, is_causal=True)


def three_dimensions(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0], v[0], is_causal=True)


def unequal_kv_lengths(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def eager_chain_with_used_scores(q, k, v):
    scores = q @ k.mT * 0.25
    return scores.masked_fill(~causal_mask(), -torch.inf).softmax(-1) @ v, scores.sum()


def causal_mask():
    return torch.arange(N)[:, None] >= torch.arange(N)


REASONS = {
    "gradients": (causal, {"grad": True}, {}, "gradients are recorded"),
    "dropout": (with_dropout, {}, {}, "dropout p=0.25"),
    "dtype": (causal, {"dtype": torch.float64}, {}, "dtype torch.float64 is not served"),
    "head_dim": (causal, {"dim": 320}, {}, "head_dim 320 is over 256"),
    "not causal": (bidirectional, {}, {}, "is defined for causal attention only"),
    "mask from data": (with_random_mask, {}, {}, "mask"),
    "bias": (with_bias, {}, {}, "bias"),
    "batch": (grouped_without_gqa, {"kv_heads": 1}, {}, "batch is broadcast"),
    "dimensions": (three_dimensions, {}, {}, "3, 3, 3 dimensions"),
    "queries past keys": (unequal_kv_lengths, {"keys": N - 40}, {}, "after the last key"),
    "short": (causal, {"queries": 100, "keys": 100}, {}, "100 keys, sparse from 128 on"),
    "decoding": (causal, {"queries": 1}, {}, "decoding: one query"),
    "config": (causal, {}, {"pattern": "dense"}, "the config keeps every head"),
    "scores read": (eager_chain_with_used_scores, {}, {}, "scores"),
}


def attention_line(function) -> int:
    """The line of the attention (its softmax for a chain) in this file."""
    lines, first = inspect.getsourcelines(function)
    words = ("scaled_dot_product_attention", "softmax")
    return next(first + i for i, line in enumerate(lines) if any(word in line for word in words))


@pytest.mark.parametrize("name", REASONS)
def test_reason_to_stay_dense_is_named_with_the_source_line(name):
    function, shapes, options, words = REASONS[name]
    with torch.set_grad_enabled(bool(shapes.get("grad"))):
        explanation = explain(function, *qkv(**shapes), options=OPTIONS | options)
    (site,) = explanation.sites
    assert site.status == "dense"
    assert words in site.reason
    assert site.source == f"{__file__}:{attention_line(function)}, in {function.__name__}"
    assert explanation.reasons == {site.reason: 1}
    # The table folds long reasons and paths over lines: compare without its borders.
    table = "".join(character for character in str(explanation) if character not in " │\n")
    assert site.reason.replace(" ", "") in table
    assert site.source.replace(" ", "") in table


@torch.no_grad()
def test_sparse_sites_have_the_density_that_was_computed():
    model, x = Decoder().eval(), torch.randn(1, 400, 32)
    options = OPTIONS | {"pattern": mpass.AShape(16, 64), "dense_above": 2.0}
    explanation = explain(model, x, options=options)
    compiled = torch.compile(
        model, backend="minference", options=options | {"inner_backend": "eager"}
    )
    with record() as log:
        compiled(x)
    (graph,) = explanation.graphs
    assert explanation.model == "Decoder"
    for cost, call in zip(graph.costs, log.calls, strict=True):
        assert list(cost.density) == call.density[0].tolist()
        assert cost.index_bytes == call.index_bytes > 0
        assert 0 < cost.predicted[0] < 1
    assert explanation.index_bytes == log.calls[0].index_bytes


@torch.no_grad()
def test_dropped_mask_is_counted_in_bytes():
    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=causal_mask())

    explanation = explain(masked, *qkv(), options=OPTIONS)
    assert explanation.sites[0].status == "sparse"
    # The mask is bool; what it is made of may be wider.
    assert explanation.mask_bytes >= N * N
    assert "masks no longer made" in str(explanation)


@torch.no_grad()
def test_graph_breaks_are_told_with_their_line():
    class Broken(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = Attention(), Attention()

        def forward(self, x):
            x = self.first(x)
            torch._dynamo.graph_break()
            return self.second(x)

    explanation = explain(Broken().eval(), torch.randn(1, N, 32), options=OPTIONS)
    assert len(explanation.graphs) == 2
    assert [site.status for site in explanation.sites] == ["sparse"] * 2
    (broken,) = explanation.breaks
    line = inspect.getsourcelines(Broken.forward)[1] + 2
    assert broken.source.startswith(f"{__file__}:{line}")
    assert "graph break" in str(explanation)


@torch.no_grad()
def test_saves_json_and_html(tmp_path):
    explanation = explain(Decoder().eval(), torch.randn(1, N, 32), options=OPTIONS)
    explanation.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert [site["layer"] for site in saved["graphs"][0]["sites"]] == [0, 1, 2]
    changed = saved["graphs"][0]
    assert changed["ops_before"]["torch._C._nn.scaled_dot_product_attention"] == 3
    assert changed["ops_after"]["minference.sparse_attention.default"] == 3
    explanation.save(tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert "layers.2" in page
    assert "http" not in page.split('id="data"')[1].split("</script>")[0]


@torch.no_grad()
def test_result_is_that_of_the_backend_and_inductor_is_not_run():
    from torch._dynamo.utils import counters

    counters.clear()
    model, x = Decoder(depth=1).eval(), torch.randn(1, N, 32)
    explain(model, x, options=OPTIONS)
    assert "fxgraph_cache_miss" not in counters["inductor"]
    assert counters["aot_autograd"] == {}


def test_unknown_option_is_refused():
    with pytest.raises(mpass.MpassError, match="unknown option 'debgu'"):
        explain(causal, *qkv(), options={"debgu": True})
