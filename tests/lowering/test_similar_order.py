"""Tokens in the order of their content: groups that are alike are blocks, whatever their places."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mpass
from mpass.errors import OptionValueError
from mpass.lowering.similar_order import LEAF, main_directions, similar_order, tree_order
from mpass.options import parse_options
from tests.helpers.truth import random_attention

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner_backend": "eager", "min_seq_len": 64, "dense_above": 2.0, "grid": "content"}


def both_ways(q, k, v, mask=None):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


def compiled(**options):
    return torch.compile(both_ways, backend="minference", options=OPTIONS | options)


def clusters(count: int, heads: int) -> torch.Tensor:
    """Tokens [1, heads, 64 * count, 16] of `count` kinds of 64 each, scattered anew per head."""
    generator = torch.Generator().manual_seed(count)
    kinds = torch.randn(count, 16, generator=generator) * 4
    tokens = kinds.repeat_interleave(64, 0)
    tokens = tokens + torch.randn(tokens.shape, generator=generator) * 0.01
    scattered = [tokens[torch.randperm(len(tokens), generator=generator)] for _ in range(heads)]
    return torch.stack(scattered)[None]


@pytest.mark.parametrize("count", [4, 7])
def test_what_is_alike_is_a_block(count):
    points = clusters(count, 3)[0]
    order = tree_order(points)
    assert torch.equal(order.sort(1).values, torch.arange(64 * count).expand(3, -1))
    blocks = points.gather(1, order[..., None].expand_as(points)).unflatten(1, (count, 64))
    within = (blocks - blocks.mean(2, keepdim=True)).square().sum(-1).mean((1, 2))
    whole = (points - points.mean(1, keepdim=True)).square().sum(-1).mean(1)
    assert (within < (1e-3 if count == 4 else 0.35) * whole).all()


@pytest.mark.parametrize("length", [1, 15, 64, 65, 130, 333])
def test_every_token_stands_once_at_any_length(length):
    q, k, _ = random_attention(2, 4, 2, length, head_dim=8)
    queries, keys, places = similar_order(q, k)
    for order, tokens in ((queries, q), (keys, k)):
        heads = torch.arange(2 * tokens.shape[1])[:, None] * length
        everyone = torch.arange(length) + heads
        assert torch.equal(order.view(-1, length).sort(-1).values, everyone)
    assert torch.equal(queries[places], torch.arange(len(places)))


def test_runs_of_means_are_nearer_to_their_keys_than_neighbours_are():
    _, k, _ = random_attention(1, 4, 1, 640)
    order = tree_order(k[0])
    sorted_keys = k[0].gather(1, order[..., None].expand_as(k[0]))

    def spread(keys):
        runs = keys.unflatten(1, (-1, LEAF))
        return float((runs - runs.mean(2, keepdim=True)).square().mean())

    assert spread(sorted_keys) < 0.95 * spread(k[0])


def test_directions_are_those_of_largest_variance():
    basis = torch.linalg.qr(torch.randn(32, 32, generator=torch.Generator().manual_seed(0))).Q
    values = 2.0 ** -torch.arange(32)
    found = main_directions((basis * values) @ basis.mT, 4)
    assert torch.allclose(found.mT @ found, torch.eye(4), atol=1e-2)
    assert ((basis[:, :4].mT @ found).square().sum(0) > 0.99).all()


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("length", [130, 333])
def test_every_key_in_the_order_of_content_is_dense_attention(batch, length):
    q, k, v = random_attention(batch, 4, 2, length)
    out = compiled(pattern="block_sparse(1000)")(q, k, v)
    assert mpass.last_report().sites[0].grid == "in the order of their content"
    assert (out - both_ways(q.double(), k.double(), v.double())).abs().max() < 1e-5
    assert out.shape == q.shape


def test_one_block_holds_what_scattered_queries_look_for():
    """Each query looks for the 64 keys of its kind, which are scattered: no neighbours are."""
    q = clusters(8, 2)
    k = q[:, :, torch.randperm(512, generator=torch.Generator().manual_seed(1))]
    v = torch.randn(1, 2, 512, 16)
    true = both_ways(q, k, v)
    options = {"pattern": "block_sparse(2)", "summaries": 16}
    errors = [
        float((compiled(**options, grid=grid)(q, k, v) - true).norm() / true.norm())
        for grid in ("content", None)
    ]
    assert errors[0] < 0.2 < 0.8 < errors[1]


def test_gradients_come_back_to_their_tokens():
    leaves = [t.requires_grad_() for t in random_attention(1, 4, 2, 150)]
    doubles = [t.detach().double().requires_grad_() for t in leaves]
    weights = torch.randn(1, 4, 150, 32)
    out = compiled(pattern="block_sparse(1000)", training="sparse")(*leaves)
    assert mpass.last_report().sites[0].training
    found = torch.autograd.grad((out * weights).sum(), leaves)
    expected = torch.autograd.grad((both_ways(*doubles) * weights).sum(), doubles)
    for got, true in zip(found, expected, strict=True):
        assert (got - true).norm() < 1e-5 * true.norm()


def test_padding_and_what_is_kept_over_steps_keep_their_order():
    q, k, v = random_attention(2, 4, 2, 150)
    mask = torch.ones(2, 1, 1, 150, dtype=torch.bool)
    mask[0, ..., 100:] = False
    out = compiled(pattern="block_sparse(1000)")(q, k, v, mask)
    assert mpass.last_report().sites[0].grid == ""
    assert (out - both_ways(q.double(), k.double(), v.double(), mask)).abs().max() < 1e-5
    compiled(pattern="block_sparse(1)", denoising=True)(q, k, v)
    assert mpass.last_report().sites[0].status == "sparse"
    assert mpass.last_report().sites[0].grid == ""


def test_content_has_no_numbers():
    with pytest.raises(OptionValueError, match="without prefix"):
        parse_options(None, {"grid": {"shape": "content", "prefix": 1}})


def test_the_op_passes_opcheck():
    q, k, _ = random_attention(1, 4, 2, 70, head_dim=8)
    torch.library.opcheck(torch.ops.minference.similar_order.default, (q, k))
