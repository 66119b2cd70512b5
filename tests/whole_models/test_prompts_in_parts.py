"""A prompt that comes in parts over a DynamicCache: chunks, and turns of a conversation.

From the second part on Dynamo makes the lengths of the cache dynamic, each tensor's by a symbol of
its own. Every part must stay sparse, in one graph, and give the tokens that eager attention gives.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from mpass.lowering.recorder import Log, record
from tests.helpers.rotation import part_of_today
from tests.helpers.toys import EVERY_KEY

transformers = pytest.importorskip("transformers", reason="builds models of transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

MODELS = {
    "llama": ("LlamaConfig", {}),
    "mistral": ("MistralConfig", {"sliding_window": 48}),
    "gemma3": (
        "Gemma3TextConfig",
        {
            "sliding_window": 48,
            "head_dim": 16,
            "layer_types": ["sliding_attention", "full_attention"],
        },
    ),
}
"""Full attention, a sliding window in every layer, and both in one model."""

OPTIONS = {
    "pattern": EVERY_KEY,
    "dense_above": 2.0,
    "min_seq_len": 32,
    "inner_backend": "eager",
}


def build(name: str):
    torch.manual_seed(0)
    config, more = MODELS[name]
    made = getattr(transformers, config)(**SIZES | more)
    return transformers.AutoModelForCausalLM.from_config(made).eval().requires_grad_(False)


def tokens(count: int, seed: int) -> torch.Tensor:
    return torch.randint(3, 64, (1, count), generator=torch.Generator().manual_seed(seed))


def answer(model, text: torch.Tensor, **more) -> torch.Tensor:
    settings = {"max_new_tokens": 2, "min_new_tokens": 2, "do_sample": False}
    return model.generate(text, attention_mask=torch.ones_like(text), **settings, **more)


def converse(model) -> tuple[list[torch.Tensor], list[int]]:
    """What a model says in four turns over one cache, and how many graphs each turn made."""
    cache = transformers.DynamicCache(config=model.config)
    text = torch.empty(1, 0, dtype=torch.int64)
    said, graphs = [], []
    for seed, count in enumerate((120, 60, 80, 50)):
        before = counters["minference"]["graphs"]
        text = answer(model, torch.cat([text, tokens(count, seed)], 1), past_key_values=cache)
        said.append(text)
        graphs.append(counters["minference"]["graphs"] - before)
    return said, graphs


def compiled(name: str):
    model = build(name)
    model.forward = torch.compile(model.forward, backend="minference", options=OPTIONS)
    return model


def ran_sparse(log: Log, parts: int) -> bool:
    return len(log.calls) == 2 * parts and all(call.lowering != "dense" for call in log.calls)


@pytest.mark.parametrize("name", part_of_today(MODELS, share=3))
def test_turns_over_one_cache_stay_sparse_in_one_graph(name):
    expected, _ = converse(build(name))
    with record() as log:
        said, graphs = converse(compiled(name))
    assert all(map(torch.equal, said, expected))
    assert ran_sparse(log, parts=4)
    # The first turn makes its prefill and decoding, the second one the graphs of a dynamic cache.
    assert graphs[2:] == [0, 0]


@pytest.mark.parametrize("name", ["mistral"])
def test_chunks_of_a_prompt_stay_sparse_in_one_graph(name):
    text = tokens(300, 7)
    expected = answer(build(name), text)
    with record() as log:
        said = answer(compiled(name), text, prefill_chunk_size=50)
    assert torch.equal(said, expected)
    assert ran_sparse(log, parts=6)
    # The first chunk, the second, all others, and decoding.
    assert counters["minference"]["graphs"] <= 4
