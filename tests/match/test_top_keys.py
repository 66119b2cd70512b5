"""Masks that keep the best keys of each query, as Doge writes them; what only looks so is dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

import mpass
from mpass.evaluate.coverage import FULL_BUDGET

B, H, HK, N, D, KEEP = 2, 4, 2, 150, 16, 16
LOWEST = torch.finfo(torch.float32).min
OPTIONS = FULL_BUDGET | {"inner_backend": "eager", "min_seq_len": 1, "read_masks": False}


def numbers(x):
    """[B, Hk, 1, N], of the values."""
    return torch.exp(-F.softplus(x[:, :HK].sum(-1)))[:, :, None, :]


def hidden(x, offset=0):
    n = x.shape[2]
    return torch.arange(n) > torch.arange(n - offset)[:, None] + offset


def kept(mask, keep=KEEP, value=LOWEST, **settings):
    best = mask.topk(keep, dim=-1, **settings).indices
    active = torch.zeros_like(mask).scatter(-1, best, 1.0)
    return mask.masked_fill(active == 0.0, value)


def attend(x, mask, offset=0):
    value = x[:, :HK].repeat_interleave(H // HK, 1)
    mask = mask[:, :, None].expand(-1, -1, H // HK, -1, -1).reshape(B, H, *mask.shape[2:])
    return F.scaled_dot_product_attention(x[:, :, offset:], value, value, attn_mask=mask)


def of_a_prefix(x):
    n = x.shape[2]
    mask = numbers(x).expand(-1, -1, n, -1).masked_fill(hidden(x), LOWEST)
    return attend(x, kept(mask, sorted=False))


def with_padding(x):
    real = torch.arange(x.shape[2]) >= torch.tensor([[0], [9]])
    unseen = hidden(x) | ~real[:, None, None, :]
    mask = numbers(x).expand(-1, -1, x.shape[2], -1).masked_fill(unseen, LOWEST)
    out = attend(x, kept(mask))
    return torch.where(real[:, None, :, None], out, 0.0)


def of_a_chunk(x):
    mask = numbers(x).expand(-1, -1, x.shape[2] - 40, -1).masked_fill(hidden(x, 40), LOWEST)
    return attend(x, kept(mask), 40)


def of_equal_numbers(x):
    """Ties at every border: torch.topk's own choice is the model's."""
    coarse = (numbers(x) * 3).round()
    return attend(x, kept(coarse.expand(-1, -1, x.shape[2], -1).masked_fill(hidden(x), LOWEST)))


def of_one_number(x):
    """As a Doge begins: its A is zero, and all keys are equally good."""
    mask = torch.exp(0 * numbers(x)).expand(-1, -1, x.shape[2], -1)
    return attend(x, kept(mask.masked_fill(hidden(x), LOWEST)))


def compiled(program, x, **options):
    torch._dynamo.reset()
    found = torch.compile(program, backend="minference", options=OPTIONS | options)(x)
    return found, mpass.reports()[-1].sites


def inputs():
    return torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))


EXACT = (of_a_prefix, with_padding, of_a_chunk, of_equal_numbers, of_one_number)


@pytest.mark.parametrize("program", EXACT)
def test_the_best_keys_of_each_query_are_exact_with_all_gradients(program, monkeypatch):
    monkeypatch.setenv("MPASS_STRICT", "1")
    x = inputs().requires_grad_()
    expected = program(x)
    found, sites = compiled(program, x, training="sparse")
    assert [(site.status, set(site.patterns)) for site in sites] == [
        ("sparse", {f"dynamic_mask({KEEP})"})
    ]
    assert sites[0].training
    assert any(f"keeps the {KEEP} keys" in line for line in sites[0].mask)
    assert torch.allclose(found, expected, atol=1e-5)
    weights = torch.linspace(-1, 1, found.numel()).view(found.shape)
    one, other = (torch.autograd.grad((out * weights).sum(), x)[0] for out in (found, expected))
    assert (one - other).norm() <= 1e-5 * other.norm()


def test_without_gradients_it_is_the_same_op():
    x = inputs()
    found, sites = compiled(of_a_prefix, x)
    assert [site.status for site in sites] == ["sparse"] and not sites[0].training
    assert torch.allclose(found, of_a_prefix(x), atol=1e-5)


def causal(x, **settings):
    mask = numbers(x).expand(-1, -1, x.shape[2], -1).masked_fill(hidden(x), LOWEST)
    return attend(x, kept(mask, **settings))


def of_all_keys(x):
    """Chosen before causality: early queries may be left without any key."""
    mask = kept(numbers(x).expand(-1, -1, x.shape[2], -1))
    return attend(x, mask.masked_fill(hidden(x), LOWEST))


def the_smallest(x):
    return causal(x, largest=False)


def hidden_by_little(x):
    return causal(x, value=-5.0)


def of_other_numbers(x):
    n = x.shape[2]
    mask = numbers(x).expand(-1, -1, n, -1).masked_fill(hidden(x), LOWEST)
    best = (-mask).topk(KEEP, dim=-1).indices
    active = torch.zeros_like(mask).scatter(-1, best, 1.0)
    return attend(x, mask.masked_fill(active == 0.0, LOWEST))


def of_half_marks(x):
    n = x.shape[2]
    mask = numbers(x).expand(-1, -1, n, -1).masked_fill(hidden(x), LOWEST)
    active = torch.ones_like(mask).scatter(-1, mask.topk(KEEP, dim=-1).indices, 1.0)
    return attend(x, mask.masked_fill(active == 0.0, LOWEST))


def written_over(x):
    n = x.shape[2]
    mask = numbers(x).expand(-1, -1, n, -1).masked_fill(hidden(x), LOWEST)
    active = torch.zeros_like(mask).scatter(-1, mask.topk(KEEP, dim=-1).indices, 1.0)
    active[..., 3:] = 1.0
    return attend(x, mask.masked_fill(active == 0.0, LOWEST))


def in_a_window(x):
    """A key that was dropped could return when a better one leaves the window."""
    n = x.shape[2]
    unseen = hidden(x) | (torch.arange(n)[:, None] - torch.arange(n) >= 50)
    return attend(x, kept(numbers(x).expand(-1, -1, n, -1).masked_fill(unseen, LOWEST)))


def twice(x):
    mask = numbers(x).expand(-1, -1, x.shape[2], -1).masked_fill(hidden(x), LOWEST)
    return attend(x, kept(kept(mask, keep=40)))


NOT_IT = (
    of_all_keys,
    the_smallest,
    hidden_by_little,
    of_other_numbers,
    of_half_marks,
    written_over,
    in_a_window,
    twice,
)


@pytest.mark.parametrize("program", NOT_IT)
def test_what_only_looks_so_stays_dense(program):
    x = inputs()
    found, sites = compiled(program, x)
    assert [site.status for site in sites] == ["dense"]
    assert torch.allclose(found, program(x), atol=1e-5)


def test_numbers_of_few_digits_stay_dense():
    def program(x):
        lowest = torch.finfo(x.dtype).min
        mask = numbers(x).expand(-1, -1, x.shape[2], -1).masked_fill(hidden(x), lowest)
        return attend(x, kept(mask, value=lowest))

    x = inputs().bfloat16()
    found, sites = compiled(program, x)
    assert "of few digits" in sites[0].reason
    assert torch.allclose(found, program(x), atol=1e-2)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"min_seq_len": 151}, "150 keys, sparse from 151"),
        ({"pattern": "dense"}, "keeps every head"),
    ],
)
def test_short_prompts_and_configured_layers_stay_dense(options, words):
    _, sites = compiled(of_a_prefix, inputs(), **options)
    assert words in sites[0].reason


def test_a_wrong_number_of_kept_keys_is_noticed(monkeypatch):
    """Validation holds the claim against what the graph computes."""
    import dataclasses

    from mpass import backend
    from mpass.validation import ValidationWarning

    plan = backend.plan_attention

    def more(site, options):
        kept_keys = dataclasses.replace(site.kept, keep=site.kept.keep + 5)
        return plan(dataclasses.replace(site, kept=kept_keys), options)

    monkeypatch.delenv("MPASS_STRICT", raising=False)
    monkeypatch.setattr(backend, "plan_attention", more)
    with pytest.warns(ValidationWarning):
        _, sites = compiled(of_a_prefix, inputs())
    assert sites[0].status == "dense"
