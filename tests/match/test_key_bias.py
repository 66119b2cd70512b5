"""Biases with one number per key: ALiBi, masks made of numbers; all spellings are exact."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

import mpass
from mpass.errors import ShapeError
from mpass.evaluate.coverage import FULL_BUDGET
from mpass.report import reports
from mpass.validation.validate import ValidationWarning

B, H, N, D = 2, 4, 80, 16
SLOPES = torch.tensor([0.5, 0.25, 0.125, 0.0625])


def causal(n: int) -> torch.Tensor:
    return torch.full((n, n), float("-inf")).triu(1)


def alibi(n: int) -> torch.Tensor:
    """[H, 1, Nk]"""
    return SLOPES[:, None, None] * torch.arange(n)


def added_to_scores(x):
    scores = x @ x.mT / 4 + alibi(x.shape[2])
    return F.softmax(scores + causal(x.shape[2]), -1) @ x


def scaled_with_the_scores(x):
    scores = (x @ x.mT + alibi(x.shape[2])[None]) * 0.25
    return F.softmax(scores + causal(x.shape[2]), -1) @ x


def in_the_product(x):
    batch, heads, n, dim = x.shape
    flat = x.reshape(batch * heads, n, dim)
    bias = alibi(n).to(x.dtype).repeat(batch, 1, 1)
    scores = bias.baddbmm(flat, flat.mT, beta=0.5, alpha=0.25).view(batch, heads, n, n)
    weights = F.softmax(scores + causal(n), -1).view(batch * heads, n, n)
    return torch.bmm(weights, flat).view(batch, heads, n, dim)


def numbers_that_hide(x):
    """[B, 1, 1, Nk], as BERT's own code makes it; a row's keys are all hidden."""
    mask = (torch.arange(x.shape[2]) < torch.tensor([[50], [0]])).float()
    scores = x @ x.mT / 4 + ((1.0 - mask) * -10000.0)[:, None, None]
    return F.softmax(scores, -1) @ x


def given_to_sdpa(x):
    bias = (x.sum((1, 3)) / 3)[:, None, None]
    return F.scaled_dot_product_attention(x, x, x, attn_mask=bias)


def expanded_to_all_rows(x):
    bias = alibi(x.shape[2]).expand(H, x.shape[2], x.shape[2])
    return F.softmax(x @ x.mT / 4 + bias + causal(x.shape[2]), -1) @ x


def of_grouped_heads(x):
    """Each query head has a slope of its own over shared keys."""
    shared = x[:, :2].repeat_interleave(2, 1)
    scores = x @ shared.mT / 4 + alibi(x.shape[2])
    return F.softmax(scores + causal(x.shape[2]), -1) @ shared


def hidden_inside_of_the_mask(x):
    """Falcon: ALiBi becomes the mask, with the causal one in it."""
    bias = (alibi(x.shape[2]) / 4)[None].expand(B, H, 1, x.shape[2])
    lowest = torch.finfo(torch.float32).min
    mask = torch.masked_fill(bias, causal(x.shape[2]) < -1, lowest)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask.to(x.dtype).contiguous())


def of_the_values(x):
    """Doge up to its window: a number per kv head and key, repeated for the query heads."""
    n = x.shape[2]
    value = x[:, :2]
    numbers = torch.exp(-F.softplus(value.sum(-1)))
    mask = numbers[:, :, None, :].expand(-1, -1, n, -1)
    mask = mask.masked_fill(causal(n) != 0, torch.finfo(x.dtype).min)
    mask = mask[:, :, None].expand(B, 2, 2, n, n).reshape(B, 4, n, n)
    return F.scaled_dot_product_attention(x, value, value, attn_mask=mask, enable_gqa=True)


def added_to_a_mask_for_sdpa(x):
    bias = (x.sum((1, 3)) / 3)[:, None, None]
    mask = bias + causal(x.shape[2]).to(x.dtype)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


def compiled_sites(program, x, **options):
    torch._dynamo.reset()
    options = FULL_BUDGET | {"inner_backend": "eager"} | options
    with torch.no_grad():
        found = torch.compile(program, backend="minference", options=options)(x)
    return found, reports()[-1].sites


PROGRAMS = (
    added_to_scores,
    scaled_with_the_scores,
    in_the_product,
    numbers_that_hide,
    given_to_sdpa,
    expanded_to_all_rows,
    of_grouped_heads,
    hidden_inside_of_the_mask,
    of_the_values,
    added_to_a_mask_for_sdpa,
)


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_a_bias_per_key_is_exact(program):
    x = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))
    expected = program(x.double())
    found, sites = compiled_sites(program, x)
    assert [site.status for site in sites] == ["sparse"], sites
    assert any("bias per key" in line for line in sites[0].mask)
    assert torch.allclose(found.double(), expected, atol=1e-4), (found - expected).abs().max()


def bias_of_each_row(x):
    bias = torch.arange(x.shape[2])[:, None] * x[0, 0, :, 0]
    return F.softmax(x @ x.mT / 4 + bias + causal(x.shape[2]), -1) @ x


def under_a_softcap(x):
    scores = 30 * torch.tanh((x @ x.mT / 4 + alibi(x.shape[2])) / 30)
    return F.softmax(scores + causal(x.shape[2]), -1) @ x


def written_later(x):
    bias = alibi(x.shape[2]).clone()
    out = F.softmax(x @ x.mT / 4 + bias + causal(x.shape[2]), -1)
    bias.zero_()
    return out @ x


def of_each_row_in_the_mask(x):
    mask = (x[:, :, :, :1] * torch.arange(x.shape[2])).masked_fill(causal(x.shape[2]) != 0, -1e30)
    return F.scaled_dot_product_attention(x, x, x, attn_mask=mask)


NO_BIAS_PER_KEY = (
    bias_of_each_row,
    under_a_softcap,
    written_later,
    of_each_row_in_the_mask,
)


@pytest.mark.parametrize("program", NO_BIAS_PER_KEY)
def test_what_is_no_bias_per_key_stays_dense(program):
    x = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))
    expected = program(x)
    found, sites = compiled_sites(program, x, read_masks=False)
    assert [site.status for site in sites] == ["dense"]
    assert torch.allclose(found, expected, atol=1e-4)


def test_proofs_with_a_bias_are_held_against_the_graph(monkeypatch):
    """Validation sees a bias that is claimed twice as large as it is."""
    import dataclasses

    from mpass import backend

    plan = backend.plan_attention

    def doubled(site, options):
        return plan(dataclasses.replace(site, bias_factor=2 * site.bias_factor), options)

    monkeypatch.delenv("MPASS_STRICT", raising=False)
    monkeypatch.setattr(backend, "plan_attention", doubled)
    x = torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))
    with pytest.warns(ValidationWarning):
        _, sites = compiled_sites(added_to_scores, x)
    assert sites[0].status == "dense"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("heads", ["one", "kv", "query"])
def test_wider_queries_and_keys_have_the_bias_in_their_scores(dtype, heads):
    from mpass.lowering.key_bias import with_key_bias

    generator = torch.Generator().manual_seed(0)
    query = torch.randn(2, 6, 5, 8, generator=generator).to(dtype)
    key = torch.randn(2, 3, 7, 8, generator=generator).to(dtype)
    count = {"one": 1, "kv": 3, "query": 6}[heads]
    bias = torch.randn(2, count, 7, generator=generator) * 1000
    wide_query, wide_key = with_key_bias(query, key, bias, scale=0.3)
    assert wide_query.shape[-1] % 8 == wide_key.shape[-1] % 8 == 0

    def scores(query, key):
        return query.double() @ key.double().repeat_interleave(2, 1).mT * 0.3

    more = bias.double() if heads == "query" else bias.double().repeat_interleave(6 // count, 1)
    expected = scores(query, key) + more[:, :, None]
    assert torch.allclose(scores(wide_query, wide_key), expected, atol=1e-2 / math.sqrt(10))


@pytest.mark.parametrize("kv_heads", [4, 2])
def test_attend_takes_a_bias(kv_heads):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(1, 4, N, D, generator=generator)
    key, value = (torch.randn(1, kv_heads, N, D, generator=generator) for _ in range(2))
    bias = alibi(N)[:, 0][None]
    found = mpass.attend(query, key, value, patterns="block_sparse", key_bias=bias, dense_above=2.0)
    group = 4 // kv_heads
    scores = query @ key.repeat_interleave(group, 1).mT / 4 + bias[:, :, None] + causal(N)
    expected = scores.softmax(-1) @ value.repeat_interleave(group, 1)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("shape", [(1, 3, N), (3, 1, N), (1, 1, N - 1), (1, N)])
def test_attend_refuses_other_shapes(shape):
    x = torch.randn(1, 4, N, D)
    with pytest.raises(ShapeError, match="key_bias"):
        mpass.attend(x, x, x, patterns="block_sparse", key_bias=torch.zeros(shape))
