"""Continuous batching: packed requests are each what they are alone, and long prefills sparse."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.errors import ArgumentError, OptionValueError, UnknownPatternError
from mpass.serving import packed_attention
from mpass.serving.packed_attention import NAME, packed_requests
from tests.helpers.toys import compile_toy

transformers = pytest.importorskip("transformers", reason="needs transformers")

LENGTHS = (300, 17, 700, 150)
"""Mixed: short ones, prefills of one step, and one that does not fit into a step of 512."""

NEW = 3

STATIC = "a_shape(32, 96)"


@pytest.fixture(autouse=True)
def sdpa_as_it_was():
    """What is registered for the process is undone."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    yield
    transformers.AttentionInterface.register(NAME, sdpa_attention_forward)


def tiny(kind: str = "llama", **more):
    """A model of 4 heads over 2, whose head_dim is 32."""
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=128,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        vocab_size=99,
        max_position_embeddings=4096,
        **more,
    )
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    return model.eval()


def prompts(lengths=LENGTHS):
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, 99, (length,), generator=generator).tolist() for length in lengths]


def generate(model, requests, max_batch_tokens=1280, **settings):
    """Tokens and their log-probabilities for each request, in order."""
    batching = transformers.ContinuousBatchingConfig(
        num_blocks=16,
        page_size=128,
        max_batch_tokens=max_batch_tokens,
        return_logprobs=True,
        **settings,
    )
    greedy = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    done = model.generate_batch(
        requests, generation_config=greedy, continuous_batching_config=batching
    )
    found = [done[name] for name in sorted(done, key=lambda name: int(name.split("_")[1]))]
    errors = [request.error for request in found if request.error]
    assert not errors, errors
    return [(request.generated_tokens, torch.tensor(request.logprobs)) for request in found]


def assert_same(first, second, tolerance=1e-4):
    for (tokens, logprobs), (others, expected) in zip(first, second, strict=True):
        assert tokens == others
        assert len(tokens) == NEW
        torch.testing.assert_close(logprobs, expected, atol=tolerance, rtol=0)


@pytest.fixture
def calls(monkeypatch):
    """(layer, queries, keys) of each sparse attention; batches run in a thread of their own."""
    made = []

    def attend(query, key, value, **given):
        made.append((given["layer"], query.shape[2], key.shape[2]))
        return mpass.attend(query, key, value, **given)

    monkeypatch.setattr(packed_attention, "attend", attend)
    return made


def test_each_request_of_a_batch_is_what_it_is_alone(calls):
    """An estimated pattern depends on where prompts are split; here they are not."""
    mpass.register_attention(
        paged=True, pattern="vertical_slash(32, 64)", min_seq_len=128, dense_above=1.0
    )
    model, requests = tiny(), prompts()
    batch = generate(model, requests)
    together = sorted(calls)
    assert together == sorted((layer, n, n) for layer in range(2) for n in LENGTHS if n >= 128)
    calls.clear()
    assert_same(batch, [generate(model, [request])[0] for request in requests])
    assert sorted(calls) == together


def test_a_pattern_that_looks_at_no_input_does_not_mind_where_prompts_are_split(calls):
    mpass.register_attention(paged=True, pattern=STATIC, min_seq_len=1, dense_above=1.0)
    model, requests = tiny(), prompts()
    batch = generate(model, requests, 512)
    chunks = {(queries, keys) for _, queries, keys in calls if queries != 1}
    assert any(queries < keys for queries, keys in chunks)
    assert sum(queries for queries, _ in chunks) == sum(LENGTHS)
    calls.clear()
    assert_same(batch, [generate(model, [request])[0] for request in requests])
    assert {(queries, keys) for _, queries, keys in calls if queries != 1} != chunks


def test_a_pattern_of_every_key_is_sdpa():
    model, requests = tiny(), prompts()
    expected = generate(model, requests, 512)
    mpass.register_attention(paged=True, pattern="vertical_slash(1, 4096)", min_seq_len=128)
    assert_same(generate(model, requests, 512), expected)


def test_sparse_prefills_are_those_of_the_compiled_model():
    pattern = mpass.VerticalSlash(32, 64)
    model, (request,) = tiny(), prompts((700,))
    options = {"pattern": pattern, "dense_above": 1.0}
    with torch.no_grad():
        logits = compile_toy(model, options)(torch.tensor([request]), use_cache=False).logits
    mpass.register_attention(paged=True, min_seq_len=128, **options)
    ((tokens, logprobs),) = generate(model, [request])
    assert tokens[0] == logits[0, -1].argmax()
    expected = torch.log_softmax(logits[0, -1].float(), -1).max()
    torch.testing.assert_close(logprobs[0], expected, atol=1e-4, rtol=0)
    dense = tiny()(torch.tensor([request]), use_cache=False).logits[0, -1]
    assert (torch.log_softmax(dense, -1).max() - expected).abs() > 1e-4  # it is sparse at all


def test_models_that_are_compiled_or_called_alone_are_as_they_were():
    mpass.register_attention(paged=True, pattern=STATIC, min_seq_len=128)
    model, ids = tiny(), torch.tensor(prompts((300,)))
    with torch.no_grad():
        expected = tiny()(ids).logits
        assert torch.equal(model(ids).logits, expected)
        compile_toy(model, {"pattern": STATIC})(ids, use_cache=False)
    assert [site.status for site in mpass.last_report().sites] == ["sparse", "sparse"]


def test_layers_with_a_sliding_window_stay_as_they_were(calls):
    mpass.register_attention(paged=True, pattern=STATIC, min_seq_len=128, dense_above=1.0)
    model = tiny(
        "gemma3_text", sliding_window=64, layer_types=["sliding_attention", "full_attention"]
    )
    batch = generate(model, prompts())
    assert {layer for layer, *_ in calls} == {1}
    assert_same(batch, [generate(model, [request])[0] for request in prompts()])


def test_the_config_beside_a_model_applies(tmp_path, calls):
    model = tiny()
    model.save_pretrained(tmp_path)
    mpass.SparseConfig(layers={1: STATIC}, default="dense", min_seq_len=128).save(
        tmp_path / "minference.json"
    )
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    mpass.register_attention(paged=True, dense_above=1.0)
    generate(loaded, prompts((300,)))
    assert {layer for layer, *_ in calls} == {1}


def test_a_config_of_another_model_is_told_to_each_request():
    mpass.register_attention(
        paged=True, config=mpass.SparseConfig("a_shape", num_heads=9), min_seq_len=128
    )
    with pytest.raises(AssertionError, match="4 query heads, the config names 9"):
        generate(tiny(), prompts((300,)))


@pytest.mark.parametrize(
    ("settings", "error"),
    [
        ({"paged": True, "pattern": "a_shap"}, UnknownPatternError),
        ({"paged": True, "pattern": "a_shape", "config": mpass.SparseConfig()}, OptionValueError),
        ({"paged": True, "min_seq_len": -1}, OptionValueError),
        ({"pattern": "a_shape"}, ArgumentError),
    ],
)
def test_wrong_settings_are_refused_at_once(settings, error):
    with pytest.raises(error):
        mpass.register_attention(**settings)


def test_requests_of_no_tokens_are_padding():
    found = list(packed_requests(torch.tensor([0, 3, 4, 4]), torch.tensor([0, 3, 9, 9])))
    assert [(r.num_queries, r.num_keys) for r in found] == [(3, 3), (1, 6)]


def test_memory_stays_flat_over_many_batches():
    """What is kept for requests goes with them."""
    import gc

    mpass.register_attention(paged=True, pattern=STATIC, min_seq_len=128, dense_above=1.0)
    model, requests = tiny(), prompts((300, 17, 150))
    sizes = []
    for _ in range(3):
        generate(model, requests)
        gc.collect()
        tensors = [found for found in gc.get_objects() if isinstance(found, torch.Tensor)]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in tensors))
    assert sizes[-1] <= sizes[1]
