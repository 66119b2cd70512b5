"""mpass.explain: densities, costs, memory, graph breaks, saving (reasons: test_reasons.py)."""

from __future__ import annotations

import functools
import inspect
import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.inspection.explanation import explain
from mpass.lowering.recorder import record
from tests.helpers.toys import Attention, Decoder

N = 192
OPTIONS = {"min_seq_len": 128}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def qkv(*, heads=4, kv_heads=4, queries=N, keys=N, dim=16, dtype=torch.float32, grad=False):
    query = torch.randn(1, heads, queries, dim, dtype=dtype, requires_grad=grad)
    key, value = (torch.randn(1, kv_heads, keys, dim, dtype=dtype) for _ in range(2))
    return query, key, value


def causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def causal_mask():
    return torch.arange(N)[:, None] >= torch.arange(N)


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
def test_a_sparse_site_that_ran_dense_says_why():
    options = OPTIONS | {"pattern": mpass.AShape(64, 128), "dense_above": 0.1}
    explanation = explain(causal, *qkv(), options=options)
    (cost,) = explanation.graphs[0].costs
    assert explanation.sites[0].status == "sparse"
    assert cost.lowering == "dense"
    assert "of the work" in cost.reason
    words = " ".join(str(explanation).split())
    assert "ran dense" in words


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


@torch.no_grad()
def test_a_callable_without_a_name_is_explained_too():
    explanation = explain(functools.partial(causal), *qkv(), options=OPTIONS)
    assert explanation.model == "partial"


def test_unknown_option_is_refused():
    with pytest.raises(mpass.MpassError, match="unknown option 'debgu'"):
        explain(causal, *qkv(), options={"debgu": True})
