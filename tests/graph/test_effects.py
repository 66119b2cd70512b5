"""What a rewritten graph still does: writes, checkpoints, and functorch around one sparse site."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from tests.masks.test_hostile import N, compare, sdpa, tensors, tril


def keep() -> torch.Tensor:
    return (torch.arange(N) >= 5)[None]


def row_zeroed(query, key, value):
    out = sdpa(query, key, value, is_causal=True)
    out[:, :, 0].zero_()
    return out + 1


def filled_through_a_transpose(query, key, value):
    out = sdpa(query, key, value, is_causal=True)
    out.transpose(1, 2).masked_fill_(~keep()[:, :, None, None], 0.0)
    return out * 2


def written_out_and_zeroed(query, key, value):
    scores = (query @ key.mT * 0.2).masked_fill(~tril(), float("-inf"))
    out = scores.softmax(-1) @ value
    out[..., 0] = 7.0
    return out


def checkpointed_and_zeroed(query, key, value):
    out = checkpoint(
        lambda q, k, v: sdpa(q, k, v, is_causal=True), query, key, value, use_reentrant=False
    )
    out[:, :, 0].zero_()
    return out + 1


def two_layers_with_a_write_between(query, key, value):
    out = sdpa(query, key, value, is_causal=True)
    out[:, :, 3].zero_()
    return sdpa(out, key, value, is_causal=True)


def list_written(query, key, value):
    cache = torch.zeros_like(key)
    torch._foreach_copy_([cache], [key])
    return sdpa(query, cache, value, is_causal=True)


def activation_in_place(query, key, value):
    query = query * 1.0
    nn.LeakyReLU(0.1, True)(query)
    return sdpa(query, key, value, is_causal=True)


def relu_by_keyword(query, key, value):
    query = query * 1.0
    F.relu(input=query, inplace=True)
    return sdpa(query, key, value, is_causal=True)


def beside_vmap(query, key, value):
    scaled = torch.vmap(lambda x: x * 2)(value)
    return sdpa(query, key, scaled, is_causal=True)


def beside_grad(query, key, value):
    gradient = torch.func.grad(lambda x: (x**2).sum())(value)
    return sdpa(query, key, gradient, is_causal=True)


def beside_jacrev(query, key, value):
    jacobian = torch.func.jacrev(lambda x: x * 3)(value[0, 0, 0, :4])
    return sdpa(query, key, value, is_causal=True) + jacobian.sum()


def padding_read_inside_of_vmap(query, key, value):
    # Functorch's bookkeeping counts as no write: the padding is still known.
    pad = torch.arange(N)[None] >= 7
    rows = torch.arange(N)
    seen = torch.vmap(lambda row: rows <= row)(rows)
    early = sdpa(query, key, value, attn_mask=tril() & pad[:, None, None])
    return early + seen.sum()


@pytest.mark.parametrize(
    "function",
    [
        row_zeroed,
        filled_through_a_transpose,
        written_out_and_zeroed,
        checkpointed_and_zeroed,
        two_layers_with_a_write_between,
        list_written,
        activation_in_place,
        relu_by_keyword,
        beside_vmap,
        beside_grad,
        beside_jacrev,
        padding_read_inside_of_vmap,
    ],
    ids=lambda function: function.__name__,
)
def test_effects_around_a_sparse_site_are_those_of_eager(function):
    statuses = compare(function, *tensors())
    assert statuses and set(statuses) == {"sparse"}


def test_writes_to_an_input_by_a_list_reach_it():
    def attention(cache, query, key, value):
        torch._foreach_copy_([cache], [key])
        return sdpa(query, key, value, is_causal=True)

    query, key, value = tensors()
    cache = torch.zeros_like(key)
    compare(attention, cache, query, key, value)
    cache.zero_()
    compare(attention, cache, query, key, value)
    assert torch.equal(cache, key)


def test_random_numbers_after_a_sparse_site_are_those_of_eager():
    def attention(query, key, value):
        F.dropout(query, 0.5)
        return sdpa(query, key, value, is_causal=True) + torch.rand(N, 32)

    torch.manual_seed(1)
    expected = attention(*tensors())
    torch._dynamo.reset()
    options = {"pattern": "dense", "inner_backend": "eager"}
    torch.manual_seed(1)
    with torch.no_grad():
        result = torch.compile(attention, backend="minference", options=options)(*tensors())
    torch.testing.assert_close(result, expected, atol=2e-5, rtol=1e-5)
