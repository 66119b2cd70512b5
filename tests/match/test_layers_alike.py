"""Layers that look alike but are not: what was found of one is not taken for the other."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.eager_equal import D, H, N, compare

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

KV = 2
GROUPS = H // KV


def kv(seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, KV, N, D, generator=generator) for _ in range(2)]


def interleaved(x):
    return x[:, :, None].expand(1, KV, GROUPS, N, D).reshape(1, H, N, D)


def tiled(x):
    return x[:, None].expand(1, GROUPS, KV, N, D).reshape(1, H, N, D)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def two_orders(q, k, v):
    return attend(attend(q, interleaved(k), interleaved(v)), tiled(k), tiled(v))


def copied(x):
    return interleaved(x).clone()


def written_between(q, k, v):
    """Equal ops in both layers, but the second writes to the copies of its keys."""
    first = attend(q, copied(k), copied(v))
    keys = copied(k)
    keys[:, 1:2].add_(1.0)
    return attend(first, keys, copied(v))


def by_permutation(q, k, v):
    """The second layer picks its heads by a tensor: the same op, other numbers."""
    order = torch.tensor([0, 0, 1, 1])
    other = torch.tensor([1, 0, 1, 0])
    first = attend(q, k[:, order], v[:, order])
    return attend(first, k[:, other], v[:, other])


@pytest.mark.parametrize(
    "program", [two_orders, written_between, by_permutation], ids=lambda program: program.__name__
)
def test_the_second_layer_reads_its_own_keys(program):
    query = torch.randn(1, H, N, D, generator=torch.Generator().manual_seed(0))
    sites = compare(program, tensors=[query, *kv()])
    assert [site.status for site in sites] == ["sparse", "sparse"]
