"""Training through a bias by distance: the gradients of T5's table are those of eager attention."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass

HEADS, LENGTH = 4, 200


class Layer(nn.Module):
    """One attention with a bias from a table by clipped distances, causal or both ways."""

    def __init__(self, causal: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table = nn.Embedding(41, HEADS)
        self.project = nn.Linear(64, 3 * 64)
        self.causal = causal

    def forward(self, x):
        queries, keys, values = self.project(x).unflatten(-1, (3, HEADS, 16)).permute(2, 0, 3, 1, 4)
        positions = torch.arange(x.shape[1])
        apart = (positions[None, :] - positions[:, None]).clamp(-20, 20) + 20
        bias = self.table(apart).permute(2, 0, 1)[None]
        if self.causal:
            bias = torch.where(positions[None, :] <= positions[:, None], bias, -torch.inf)
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)


def gradients(layer, run, x):
    layer.zero_grad()
    run(x).square().sum().backward()
    return {name: parameter.grad.clone() for name, parameter in layer.named_parameters()}


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
def test_the_table_of_a_bias_is_trained_sparse(causal):
    torch._dynamo.reset()
    layer = Layer(causal)
    x = torch.randn(2, LENGTH, 64, generator=torch.Generator().manual_seed(0))
    options = {
        "training": "sparse",
        "pattern": "block_sparse",
        "min_seq_len": 8,
        "dense_above": 2.0,
        "inner_backend": "aot_eager",
    }
    compiled = torch.compile(layer, backend="minference", options=options)
    expected, found = gradients(layer, layer, x), gradients(layer, compiled, x)
    (site,) = mpass.last_report().sites
    assert site.status == "sparse" and site.training, site.reason
    for name, gradient in expected.items():
        assert torch.allclose(found[name], gradient, rtol=1e-3, atol=1e-3), name
