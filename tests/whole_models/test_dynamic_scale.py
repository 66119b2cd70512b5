"""Scales that are floats of the user's module: constants, even where Dynamo takes them for inputs.

Under `dynamic=True` it reads such a float anew in each call; a guard on its value fixes it again.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.evaluate.coverage import FULL_BUDGET


class Scaled(nn.Module):
    """Attention over x [B, H, N, D] with a scale that is an attribute."""

    def __init__(self, spelling: str):
        super().__init__()
        self.spelling, self.scaling, self.cap = spelling, 0.3, 20.0

    def forward(self, x):
        if self.spelling == "sdpa":
            return F.scaled_dot_product_attention(x, x, x, is_causal=True, scale=self.scaling)
        scale = x.shape[2] ** -0.5 if self.spelling == "by length" else self.scaling
        scores = x @ x.mT * scale
        if self.spelling == "softcap":
            scores = torch.tanh(scores / self.cap) * self.cap
        hidden = torch.ones(x.shape[2], x.shape[2], dtype=torch.bool).triu(1)
        return torch.softmax(scores.masked_fill(hidden, -torch.inf), -1) @ x


def inputs(length):
    x = torch.randn(1, 2, length, 16, generator=torch.Generator().manual_seed(length))
    for dim in (0, 1, 3):
        torch._dynamo.mark_static(x, dim)
    return x


@torch.no_grad()
@pytest.mark.parametrize("spelling", ["sdpa", "eager", "softcap"])
def test_scale_of_a_module_is_a_constant_under_dynamic_true(spelling):
    model = Scaled(spelling)
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="minference", dynamic=True, fullgraph=True, options=FULL_BUDGET
    )
    torch.testing.assert_close(compiled(inputs(200)), model(inputs(200)), atol=1e-5, rtol=0)
    (site,) = mpass.last_report().sites
    assert site.status == "sparse", site.reason
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(inputs(333)), model(inputs(333)), atol=1e-5, rtol=0)
    model.scaling, model.cap = 0.05, 3.0
    torch.testing.assert_close(compiled(inputs(200)), model(inputs(200)), atol=1e-5, rtol=0)


@torch.no_grad()
def test_scale_that_depends_on_the_length_stays_dense_in_one_graph():
    model = Scaled("by length")
    torch._dynamo.reset()
    compiled = torch.compile(
        model, backend="minference", dynamic=True, fullgraph=True, options=FULL_BUDGET
    )
    torch.testing.assert_close(compiled(inputs(200)), model(inputs(200)), atol=1e-5, rtol=0)
    assert "scaled by what is not a constant" in mpass.last_report().sites[0].reason
    with torch.compiler.set_stance("fail_on_recompile"):
        torch.testing.assert_close(compiled(inputs(90)), model(inputs(90)), atol=1e-5, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_transformers_model_is_sparse_under_dynamic_true(implementation):
    transformers = pytest.importorskip("transformers", reason="builds a model from config")
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
    )
    torch.manual_seed(0)
    model = transformers.AutoModel.from_config(config, attn_implementation=implementation).eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="minference", dynamic=True, options=FULL_BUDGET)
    for length in (100, 171):
        ids = torch.arange(length)[None] % 128
        expected = model(ids, use_cache=False).last_hidden_state
        torch.testing.assert_close(
            compiled(ids, use_cache=False).last_hidden_state, expected, atol=1e-4, rtol=0
        )
        assert len(mpass.last_report().sparse_sites) == 2
