"""Prompts through `generate()`: in turns over one cache, in chunks, and into a static cache.

From the second part on Dynamo makes the lengths of a DynamicCache dynamic, each tensor's by a
symbol of its own; for a static cache transformers builds the mask outside of the compiled model.
Every layer of every part must be sparse, in few graphs, and give the tokens that eager attention
gives.
"""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.utils import counters

from mpass.config.promise import most_lost
from mpass.lowering.guard import guarded
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

BOTH_KINDS = {"layer_types": ["sliding_attention", "full_attention"]}

MODELS = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {"head_dim": 16}),
    "mistral": ("MistralConfig", {"sliding_window": 48}),
    "gemma3": ("Gemma3TextConfig", {"sliding_window": 48, "head_dim": 16, **BOTH_KINDS}),
    "glm4": ("Glm4Config", {"head_dim": 16}),
    "phi3": ("Phi3Config", {}),
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
    return model.generate(text, **{"attention_mask": torch.ones_like(text)} | settings | more)


# -- how people run a prompt: each gives all tokens, and how many graphs each turn made -------

Ran = tuple[list[torch.Tensor], list[int]]


def converse(model, cache) -> Ran:
    text = torch.empty(1, 0, dtype=torch.int64)
    said, graphs = [], []
    for seed, count in enumerate((120, 60, 80, 50)):
        before = counters["minference"]["graphs"]
        text = answer(model, torch.cat([text, tokens(count, seed)], 1), past_key_values=cache)
        said.append(text)
        graphs.append(counters["minference"]["graphs"] - before)
    return said, graphs


def turns(model) -> Ran:
    return converse(model, transformers.DynamicCache(config=model.config))


def static_turns(model) -> Ran:
    return converse(model, transformers.StaticCache(config=model.config, max_cache_len=400))


def once(model, text: torch.Tensor, **more) -> Ran:
    before = counters["minference"]["graphs"]
    said = answer(model, text, **more)
    return [said], [counters["minference"]["graphs"] - before]


def chunks(model) -> Ran:
    return once(model, tokens(300, 7), prefill_chunk_size=50)


def static(model) -> Ran:
    return once(model, tokens(120, 7), cache_implementation="static")


def static_chunks(model) -> Ran:
    return once(model, tokens(300, 7), prefill_chunk_size=50, cache_implementation="static")


def static_padded(model) -> Ran:
    text = torch.cat([tokens(120, 7), tokens(120, 8)])
    mask = torch.ones_like(text)
    mask[1, :40] = 0
    return once(model, text, attention_mask=mask, cache_implementation="static")


WAYS = {
    turns: (4, [2, 2, 1, 0]),
    static_turns: (4, [2, 2, 1, 0]),
    chunks: (6, [4]),
    static: (1, [2]),
    static_chunks: (6, [4]),
    static_padded: (1, [2]),
}
"""Of each way: into how many parts a prompt is cut, and how many graphs each turn may make.

The first turn makes its prefill and decoding, the second one the graphs of a dynamic cache, and one
more is allowed in all later ones. Chunks make the first, the second, all others, and decoding.
"""

RUNS = [(name, way) for name in MODELS for way in WAYS]


def check(name: str, way) -> None:
    expected, _ = way(build(name))
    model = build(name)
    model.forward = torch.compile(model.forward, backend="minference", options=OPTIONS)
    with record() as log:
        said, graphs = way(model)
    assert all(map(torch.equal, said, expected))
    parts, allowed = WAYS[way]
    assert ran_sparse(log, parts), [
        (c.layer, c.lowering, c.num_queries, c.reason) for c in log.calls
    ]
    assert sum(graphs) <= sum(allowed) and sum(graphs[2:]) <= 1, graphs


def ran_sparse(log: Log, parts: int) -> bool:
    """Whether both layers of each part ran sparse; decoding is left out."""
    prefills = [call for call in log.calls if call.num_queries > 1]
    return len(prefills) == 2 * parts and all(call.lowering != "dense" for call in prefills)


@pytest.mark.parametrize(
    ("name", "way"), part_of_today(RUNS, share=9), ids=lambda of: getattr(of, "__name__", of)
)
def test_every_part_of_a_prompt_is_sparse_in_few_graphs(name, way):
    check(name, way)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "way"), RUNS, ids=lambda of: getattr(of, "__name__", of))
def test_every_model_in_every_way(name, way):
    check(name, way)


@pytest.mark.parametrize("way", [turns, chunks, static_padded], ids=lambda of: of.__name__)
def test_every_part_of_a_prompt_is_held_against_what_was_promised(way, monkeypatch):
    seen = []

    def watched(inputs, index, share, *, measured=0):
        seen.append((inputs.mask.query_offset, inputs.query.shape[2], share))
        return guarded(inputs, index, share, measured=measured)

    monkeypatch.setattr("mpass.lowering.ops.guarded", watched)
    model = build("llama")
    options = {name: value for name, value in OPTIONS.items() if name != "pattern"}
    options["max_loss"] = 0.01
    model.forward = torch.compile(model.forward, backend="minference", options=options)
    with record() as log:
        way(model)
    prefills = [call for call in log.calls if call.num_queries > 1]
    assert len(prefills) == 2 * WAYS[way][0]
    assert [(c.num_keys - c.num_queries, c.num_queries) for c in prefills] == [
        (offset, count) for offset, count, _ in seen
    ]
    assert {share for *_, share in seen} == {most_lost(0.01)}
