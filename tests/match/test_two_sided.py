"""Attention that sees both ways: its windows are computed exactly, and what it needs is told."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import mpass
from mpass.lowering.recorder import record

N = 300
OPTIONS = {"inner_backend": "eager", "min_seq_len": 64, "dense_above": 2.0}


def qkv(n: int = N, batch: int = 1) -> torch.Tensor:
    return torch.randn(3, batch, 2, n, 16, generator=torch.Generator().manual_seed(0))


def distances(n: int) -> torch.Tensor:
    return torch.arange(n)[:, None] - torch.arange(n)


def inside(q, k, v, pad):
    return F.scaled_dot_product_attention(q, k, v, distances(q.shape[2]).abs() <= 40)


def inside_of_padding(q, k, v, pad):
    mask = (distances(q.shape[2]).abs() <= 40) & pad[:, None, None, :]
    return F.scaled_dot_product_attention(q, k, v, mask)


def added_to_scores(q, k, v, pad):
    hidden = distances(q.shape[2]).abs() > 40
    bias = torch.zeros(q.shape[2], q.shape[2]).masked_fill(hidden, torch.finfo(q.dtype).min)
    return (q @ k.mT * q.shape[-1] ** -0.5 + bias).softmax(-1) @ v


@pytest.mark.parametrize("attention", [inside, inside_of_padding, added_to_scores])
@pytest.mark.parametrize("pattern", [None, "union", "block_sparse(1)"])
def test_window_that_reaches_both_ways_is_computed_whole(attention, pattern):
    q, k, v = qkv(batch=2)
    pad = torch.ones(2, N, dtype=torch.bool)
    pad[1, 250:] = False
    options = OPTIONS if pattern is None else OPTIONS | {"pattern": pattern}
    compiled = torch.compile(attention, backend="minference", options=options)
    with record() as log:
        out = compiled(q, k, v, pad)
    truth = attention(q, k, v, pad)
    (site,) = mpass.reports()[-1].sites
    assert site.status == "sparse", site.reason
    real = pad if attention is inside_of_padding else torch.ones_like(pad)
    error = (out - truth).abs().amax((1, 3))
    assert error[real].max() < 1e-5
    (call,) = log.calls
    assert call.lowering == "cpu" and float(call.density.min()) == 1.0  # of the window's cells


def test_window_of_dynamic_length_serves_every_length_in_one_graph():
    torch._dynamo.reset()
    before = counters["minference"]["graphs"]
    compiled = torch.compile(inside, backend="minference", options=OPTIONS, dynamic=True)
    for n in (200, 333):
        q, k, v = qkv(n)
        assert (compiled(q, k, v, None) - inside(q, k, v, None)).abs().max() < 1e-5
    assert counters["minference"]["graphs"] == before + 1
