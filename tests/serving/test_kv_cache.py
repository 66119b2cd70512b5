"""A cache that was cut to what a prompt selected answers as the whole one with the rest hidden."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.errors import KVCacheError
from tests.helpers.requirements import needs_package

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), needs_package("transformers", "no models")]

N, BUDGET = 160, 48
SNAP = mpass.SnapKV(budget=BUDGET, window=16)


def tiny_llama():
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    return transformers.LlamaForCausalLM(config).eval()


def prefill(model, ids, *, attention_mask=None, selects=SNAP):
    """The cache after a prompt, and what was selected."""
    options = {"kv_select": selects, "min_seq_len": 64, "inner_backend": "eager"}
    compiled = torch.compile(
        model, backend="minference", options=options | {"pattern": "block_sparse(2)"}
    )
    with torch.no_grad(), mpass.select_keys() as selection:
        cache = compiled(ids, attention_mask=attention_mask, use_cache=True).past_key_values
    return cache, selection


def tokens(batch: int = 1):
    return torch.randint(0, 97, (batch, N), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_cut_cache_answers_as_the_whole_one_with_the_rest_hidden(padded):
    """Each layer and head keeps the same keys here, so that a mask can say which."""
    model, ids = tiny_llama(), tokens(2)
    mask = torch.ones_like(ids)
    if padded:
        mask[1, :70] = 0
    cache, selection = prefill(model, ids, attention_mask=mask)
    assert set(selection.positions) == {0, 1} and selection.length == {0: N, 1: N}
    assert selection.positions[0].shape == (2, 2, BUDGET)
    for layer in selection.positions:
        selection.positions[layer] = selection.positions[0][:, :1].expand(-1, 2, -1)
    whole = transformers.DynamicCache()
    for number, layer in enumerate(cache.layers):
        whole.update(layer.keys, layer.values, number)
    seen = torch.zeros(2, 1, 1, N, dtype=torch.bool)
    seen.scatter_(3, selection.positions[0][:, :1, None].long(), True)
    after, said = torch.tensor([[5, 6, 7], [8, 9, 10]]), []
    position_ids = torch.arange(N, N + 3).expand(2, -1)
    if padded:
        position_ids = position_ids - torch.tensor([[0], [70]])
    assert mpass.compress(cache, selection) is cache
    assert cache.layers[0].keys.shape == (2, 2, BUDGET, 16) and cache.get_seq_length() == N
    with torch.no_grad():
        for step in range(3):
            told = torch.cat([mask, torch.ones(2, step + 1, dtype=mask.dtype)], 1)
            own = {"position_ids": position_ids[:, step : step + 1]} if padded else {}
            logits = model(
                after[:, step : step + 1], past_key_values=cache, attention_mask=told, **own
            ).logits
            four = torch.cat([seen, torch.ones(2, 1, 1, step + 1, dtype=torch.bool)], -1)
            expected = model(
                after[:, step : step + 1],
                past_key_values=whole,
                attention_mask=four,
                position_ids=position_ids[:, step : step + 1],
            ).logits
            said.append((logits - expected).abs().max())
    assert max(said) < 1e-5
    assert cache.get_seq_length() == N + 3 and cache.layers[1].keys.shape[2] == BUDGET + 3


def test_a_budget_of_all_keys_cuts_nothing_and_generate_goes_on():
    model, ids = tiny_llama(), tokens()
    cache, selection = prefill(model, ids[:, :-1], selects=mpass.SnapKV(budget=N))
    mpass.compress(cache, selection)
    assert cache.layers[0].keys.shape[2] == N - 1
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=4, do_sample=False)
        said = model.generate(ids, max_new_tokens=4, do_sample=False, past_key_values=cache)
    assert said.shape == expected.shape


def test_generate_goes_on_with_a_cut_cache_at_the_places_after_the_prompt():
    model, ids = tiny_llama(), tokens()
    cache, selection = prefill(model, ids[:, :-1])
    mpass.compress(cache, selection)
    seen = []
    handle = model.model.rotary_emb.register_forward_pre_hook(
        lambda module, arguments, values: seen.append((*arguments, *values.values())[-1].tolist()),
        with_kwargs=True,
    )
    with torch.no_grad():
        model.generate(ids, max_new_tokens=3, do_sample=False, past_key_values=cache)
    handle.remove()
    assert seen == [[[N - 1]], [[N]], [[N + 1]]]


def test_each_listener_may_have_a_rule_of_its_own_and_one_graph_serves_all():
    """As of a question: its own tokens look (FINCH)."""
    from torch._dynamo.utils import counters

    model, ids = tiny_llama(), tokens()
    options = {"kv_select": SNAP, "min_seq_len": 64, "inner_backend": "eager"}
    compiled = torch.compile(model, backend="minference", options=options)
    question = mpass.SnapKV(budget=20, window=7, kernel=1, by_length=True)
    counters.clear()
    with torch.no_grad():
        with mpass.select_keys() as plain, mpass.select_keys(question) as asked:
            compiled(ids, use_cache=True)
        with mpass.select_keys(question) as alone:
            cache = compiled(ids, use_cache=True).past_key_values
    assert counters["stats"]["unique_graphs"] == 1
    assert plain.positions[1].shape[-1] == BUDGET and asked.positions[1].shape[-1] == 20
    assert torch.equal(asked.positions[1], alone.positions[1])
    assert torch.equal(asked.positions[0][0, 0, -7:], torch.arange(N - 7, N).int())
    assert mpass.compress(cache, alone).layers[1].keys.shape[2] == 20


def test_nothing_is_selected_where_nobody_listens():
    model = tiny_llama()
    compiled = torch.compile(
        model,
        backend="minference",
        options={"kv_select": SNAP, "min_seq_len": 64, "inner_backend": "eager"},
    )
    with torch.no_grad():
        cache = compiled(tokens(), use_cache=True).past_key_values
    with pytest.raises(KVCacheError, match=r"layer 0 of the cache .* selected nothing"):
        mpass.compress(cache, mpass.KVSelection())


def test_what_cannot_be_cut_is_refused_before_anything_is():
    model, ids = tiny_llama(), tokens(2)
    mask = torch.ones_like(ids)
    mask[1, : N - BUDGET + 1] = 0
    cache, selection = prefill(model, ids, attention_mask=mask)
    with pytest.raises(KVCacheError, match="fewer real keys than the budget"):
        mpass.compress(cache, selection)
    assert all(layer.keys.shape[2] == N for layer in cache.layers)

    cache, selection = prefill(model, ids)
    cache.update(torch.zeros(2, 2, 1, 16), torch.zeros(2, 2, 1, 16), 0)
    with pytest.raises(KVCacheError, match=f"it has {N + 1} keys, the selection is of {N}"):
        mpass.compress(cache, selection)

    static = transformers.StaticCache(config=model.config, max_cache_len=N)
    with pytest.raises(KVCacheError, match="StaticLayer; a DynamicCache is needed"):
        mpass.compress(static, selection)

    cache, selection = prefill(model, ids)
    mpass.compress(cache, selection)
    with pytest.raises(KVCacheError, match="CutLayer"):
        mpass.compress(cache, selection)
    with pytest.raises(KVCacheError, match="tokens of a prompt that was cut"):
        cache.layers[0].crop(-1)


def test_sliding_layers_stay_as_they_are():
    from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

    cache = transformers.DynamicCache()
    cache.layers = [DynamicSlidingWindowLayer(sliding_window=32), DynamicLayer()]
    keys = torch.randn(1, 2, N, 16)
    for number in range(2):
        cache.update(keys, keys, number)
    positions = torch.arange(0, N, 4, dtype=torch.int32).expand(1, 2, -1)
    mpass.compress(cache, mpass.KVSelection({1: positions}, {1: N}))
    assert type(cache.layers[0]) is DynamicSlidingWindowLayer
    assert torch.equal(cache.layers[1].keys, keys[:, :, ::4])
    assert cache.get_mask_sizes(1, 1) == (N // 4 + 1, N - N // 4)
