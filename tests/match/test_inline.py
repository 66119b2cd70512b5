"""Attention inside of sub-graphs: each call of one is a site of its own."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import mpass
import mpass.lowering.ops
from mpass.match import find_attention, inline_subgraphs
from tests.helpers.recording import record

B, H, N, D = 2, 4, 24, 16


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))


def seen(n: int) -> torch.Tensor:
    return torch.tril(torch.ones(n, n, dtype=torch.bool))


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.projection = nn.Linear(D, D)

    def forward(self, x, mask):
        y = self.projection(x)
        return x + F.scaled_dot_product_attention(y, y, y, mask)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention()

    @torch.compiler.nested_compile_region
    def region(self, x, mask):
        return self.attention(x, mask)

    def forward(self, x, mask, kind):
        if kind == "region":
            return self.region(x, mask)
        return torch.utils.checkpoint.checkpoint(self.attention, x, mask, use_reentrant=False)


class Stack(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList(Block() for _ in range(3))

    def forward(self, x):
        mask = seen(x.shape[2])
        for layer in self.layers:
            x = layer(x, mask, self.kind)
        return x


@pytest.mark.parametrize("kind", ["checkpoint", "region"])
def test_attention_in_sub_graphs_is_found_per_call(kind, x):
    model = Stack(kind).eval()
    found, result = record(model, x)
    assert [each.site.layer for each in found] == [0, 1, 2]
    assert all(each.site.mask is not None and each.error() < 1e-5 for each in found)
    with torch.no_grad():
        torch.testing.assert_close(result, model(x))


class MarkedStack(nn.Module):
    """Checkpointed blocks whose attention is the op of attn_implementation="minference"."""

    def __init__(self, op):
        super().__init__()
        self.op = op
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(3))

    def attention(self, layer, x):
        y = layer(x)
        told = (None, None, 0, 0, True, D**-0.5, 0.0)
        return x + self.op(y, y, y, *told)

    def forward(self, x):
        for layer in self.layers:
            x = torch.utils.checkpoint.checkpoint(self.attention, layer, x, use_reentrant=False)
        return x


def test_checkpointed_attention_by_our_own_op_is_found(x):
    model = MarkedStack(torch.ops.minference.attention).eval()
    found, result = record(model, x)
    assert [each.site.spelling for each in found] == ["minference"] * 3
    assert [each.site.dense_reason for each in found] == [""] * 3
    assert all(each.error() < 1e-5 for each in found)
    with torch.no_grad():
        torch.testing.assert_close(result, model(x))


def test_checkpointed_attention_by_our_own_op_becomes_sparse(x):
    model = MarkedStack(torch.ops.minference.attention.default).eval()
    options = {"min_seq_len": 1, "inner_backend": "eager", "pattern": "a_shape"}
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend="minference", options=options)(x)
    assert [site.reason for site in mpass.last_report().sites] == [""] * 3
    assert len(mpass.last_report().sparse_sites) == 3


def test_checkpointed_attention_under_gradients_is_left_alone(x):
    inlined, sites = [], []

    def backend(gm, _inputs):
        inlined.append(inline_subgraphs(gm))
        sites.extend(find_attention(gm))
        return gm

    torch._dynamo.reset()
    torch.compile(Stack("checkpoint"), backend=backend)(x.requires_grad_())
    assert inlined == [0]
    assert len(sites) == 3 and all("no_grad" in site.dense_reason for site in sites)
