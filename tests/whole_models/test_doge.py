"""transformers' Doge above its window: trained through the mask that it learns."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers
from torch import Tensor, nn

import mpass


def doge(keep: int, ties: bool = False) -> nn.Module:
    """Two layers with masks as after some training; ties: as before it, A is zero."""
    torch.manual_seed(0)
    config = transformers.DogeConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        use_cache=False,
        keep_window_size=keep,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
        attn_implementation="sdpa",
    )
    model = transformers.DogeForCausalLM(config)
    for layer in model.model.layers:
        if not ties:
            nn.init.normal_(layer.self_attn.A)
        nn.init.normal_(layer.self_attn.dt_proj.weight)
    return model


def logits_and_gradients(model: nn.Module, ids: Tensor, real: Tensor | None) -> list[Tensor]:
    logits = model(ids, attention_mask=real).logits
    if real is not None:
        logits = logits * real[:, :, None]
    weights = torch.linspace(-1, 1, logits.numel()).view(logits.shape)
    return [logits, *torch.autograd.grad((logits * weights).sum(), list(model.parameters()))]


def compare(length: int, keep: int, ties: bool = False, padding: int = 0, **options) -> None:
    model = doge(keep, ties)
    torch.manual_seed(1)
    batch = 2 if padding else 1
    ids = torch.randint(1, 64, (batch, length))
    real = torch.ones(batch, length, dtype=torch.long) if padding else None
    if real is not None:
        real[1, :padding] = 0
    torch._dynamo.reset()
    sparse = copy.deepcopy(model)
    sparse.compile(backend="minference", options={"training": "sparse"} | options)
    found = logits_and_gradients(sparse, ids, real)
    expected = logits_and_gradients(model, ids, real)
    sites = mpass.last_report().sites
    assert [set(site.patterns) for site in sites] == [{f"dynamic_mask({keep})"}] * 2
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


@pytest.mark.parametrize(
    ("keep", "ties", "padding"), [(64, False, 0), (64, True, 0), (100, False, 9)]
)
def test_logits_and_all_gradients_are_those_of_transformers(keep, ties, padding):
    compare(512, keep, ties, padding, inner_backend="eager")


@pytest.mark.slow
@pytest.mark.parametrize("length", [1024, 2048, 4096])
@pytest.mark.parametrize("keep", [64, 512, 2048])
def test_longer_prompts_and_windows(length, keep):
    if keep >= length:
        pytest.skip("every key is kept: the mask has no topk")
    compare(length, keep, inner_backend="eager")


@pytest.mark.slow
def test_doge_by_inductor():
    compare(700, 64, padding=9, inner_backend="inductor")


def test_up_to_its_window_a_doge_is_trained_with_a_bias_per_key():
    model, ids = doge(512), torch.randint(1, 64, (1, 150))
    torch._dynamo.reset()
    sparse = copy.deepcopy(model)
    options = {"training": "sparse", "pattern": "block_sparse(99)", "min_seq_len": 1}
    sparse.compile(backend="minference", options=options | {"inner_backend": "eager"})
    found, expected = (logits_and_gradients(net, ids, None) for net in (sparse, model))
    assert all(site.training for site in mpass.last_report().sparse_sites)
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()


def test_lengths_may_be_symbols_and_prompts_come_in_chunks():
    model = doge(64)
    torch._dynamo.reset()
    sparse = copy.deepcopy(model)
    options = {"training": "sparse", "inner_backend": "eager", "min_seq_len": 65}
    sparse.compile(backend="minference", options=options)
    for length in (150, 190, 333):
        ids = torch.randint(1, 64, (1, length))
        found, expected = (logits_and_gradients(net, ids, None) for net in (sparse, model))
        for one, other in zip(found, expected, strict=True):
            assert (one - other).norm() <= 1e-5 * other.norm()
        sites = mpass.last_report().sites
        assert [set(site.patterns) for site in sites] == [{"dynamic_mask(64)"}] * 2
    ids = torch.randint(1, 64, (1, 360))
    caches = [transformers.DynamicCache(config=model.config) for _ in range(2)]
    with torch.no_grad():
        for part in (ids[:, :220], ids[:, 220:]):
            logits = [
                net(part, past_key_values=cache, use_cache=True).logits
                for net, cache in zip((sparse, model), caches, strict=True)
            ]
            assert torch.allclose(*logits, atol=1e-5)
            sites = mpass.reports()[-1].sites
            assert [site.status for site in sites] == ["sparse"] * 2
