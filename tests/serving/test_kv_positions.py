"""Kept keys that move together: each layer's rotation is proven, and the move is exact."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.errors import KVCacheError
from mpass.serving.kv_positions import rotations
from tests.helpers.requirements import needs_package

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), needs_package("transformers", "no models")]

N, KEPT = 40, 12
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
    "pad_token_id": 0,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}
DYNAMIC = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 1e4}
FAMILIES = {
    "halves": ("Llama", {}),
    "halves, scaled": (
        "Llama",
        {"rope_parameters": YARN | {"original_max_position_embeddings": 16}},
    ),
    "neighbours": ("Cohere", {}),
    "a part of the channels": ("Phi", {"partial_rotary_factor": 0.5}),
    "a part of the channels, neighbours": ("Glm", {"head_dim": 16}),
    "two bases": (
        "Gemma3",
        {"head_dim": 16, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "every other layer": ("SmolLM3", {"no_rope_layers": [1, 0]}),
}


def tiny(family: str, *, layers: int, **more):
    """A model of transformers with random weights."""
    name, own = FAMILIES.get(family, (family, {}))
    own = {k: v[:layers] if isinstance(v, list) else v for k, v in own.items()}
    config = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    torch.manual_seed(0)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "GPT2" else f"{name}ForCausalLM")
    return model(config(**{**SIZES, **own, **more}, num_hidden_layers=layers)).eval()


def cache_of(model, ids, start: int = 0):
    """The cache of tokens that stand from `start` on."""
    position_ids = torch.arange(start, start + ids.shape[1])[None]
    with torch.no_grad():
        return model(ids, position_ids=position_ids, use_cache=True).past_key_values


def tokens(seed: int = 1):
    return torch.randint(1, 97, (1, N), generator=torch.Generator().manual_seed(seed))


def select(*rows: torch.Tensor, layers: int = 1) -> mpass.KVSelection:
    """The same positions in each layer, a row per kv head."""
    positions = torch.stack([row.sort().values for row in rows])[None].int()
    return mpass.KVSelection(
        dict.fromkeys(range(layers), positions), dict.fromkeys(range(layers), N)
    )


def some_positions(seed: int) -> torch.Tensor:
    others = torch.randperm(N - 1, generator=torch.Generator().manual_seed(seed))[: KEPT - 1]
    return torch.cat([others, torch.tensor([N - 1])])


@pytest.mark.parametrize("family", FAMILIES)
def test_a_rotation_takes_every_key_of_a_prompt_to_another_place(family):
    """Attention knows distances alone, so that a prompt that starts later has the same keys."""
    model, ids = tiny(family, layers=2), tokens()
    here, there = cache_of(model, ids), cache_of(model, ids, start=9)
    for layer, rotation in enumerate(rotations(model, N)):
        assert rotation is not None
        turned = rotation.turn(here.layers[layer].keys, torch.tensor(9))
        torch.testing.assert_close(turned, there.layers[layer].keys, atol=2e-5, rtol=0)
    counts = [rotation.frequencies.shape[0] for rotation in rotations(model, N)]
    assert counts == {"every other layer": [8, 0], "a part of the channels": [4, 4]}.get(
        family, [4, 4] if "channels" in family else [8, 8]
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_moved_keys_are_those_of_a_model_that_read_the_kept_tokens_alone(family):
    """Keys of a first layer depend on nothing but their token and place."""
    model, ids = tiny(family, layers=1), tokens()
    rows = [some_positions(seed).sort().values for seed in range(2)]
    cache = mpass.compress(cache_of(model, ids), select(*rows), compact=model)
    for head, row in enumerate(rows):
        own = cache_of(model, ids[:, row], start=N - KEPT).layers[0]
        torch.testing.assert_close(
            cache.layers[0].keys[:, head], own.keys[:, head], atol=2e-5, rtol=0
        )
        assert torch.equal(cache.layers[0].values[:, head], own.values[:, head])
    assert cache.get_seq_length() == N


def test_what_is_said_is_what_a_model_says_that_read_the_kept_tokens_alone():
    model, ids, row = tiny("halves", layers=1), tokens(), some_positions(3).sort().values
    cache = mpass.compress(cache_of(model, ids), select(row, row), compact=torch.compile(model))
    after = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        said = model(after, past_key_values=cache).logits
        expected = model(torch.cat([ids[:, row], after], 1)).logits[:, KEPT:]
        plain = mpass.compress(cache_of(model, ids), select(row, row))
        apart = model(after, past_key_values=plain).logits
    torch.testing.assert_close(said, expected, atol=1e-5, rtol=0)
    assert (apart - expected).abs().max() > 1e-3, "this prompt would not show it"


def test_keys_that_need_not_move_keep_their_bits():
    model, ids = tiny("halves", layers=2).bfloat16(), tokens()
    whole = cache_of(model, ids)
    keys = [layer.keys.clone() for layer in whole.layers]
    last = torch.arange(N - KEPT, N)
    cache = mpass.compress(whole, select(last, last, layers=2), compact=model)
    for layer, own in zip(cache.layers, keys, strict=True):
        assert torch.equal(layer.keys, own[:, :, -KEPT:])


def test_half_precision_is_proven_within_its_rounding():
    model, ids = tiny("halves", layers=2).bfloat16(), tokens()
    cache = cache_of(model, ids)
    row = some_positions(3)
    mpass.compress(cache, select(row, row, layers=2), compact=model)
    own = cache_of(model, ids[:, row.sort().values], start=N - KEPT).layers[0].keys
    assert (cache.layers[0].keys - own).norm() < 0.02 * own.norm()


@pytest.mark.parametrize(
    ("family", "more", "problem"),
    [
        ("GPT2", {"n_positions": 64}, "do not move by one rotation per position"),
        (
            "Llama",
            {"rope_parameters": DYNAMIC, "max_position_embeddings": 16},
            "do not move by one rotation per position",
        ),
        (
            "Llama",
            {"rope_parameters": {"rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
            "more than one position each",
        ),
        ("GPT2", {"n_positions": 8}, "does not run one token at a position"),
    ],
)
def test_keys_that_nothing_proves_are_left_where_they_are(family, more, problem):
    model = tiny(family, layers=1, **more)
    heads = model.config.num_attention_heads if family == "GPT2" else 2
    cache = transformers.DynamicCache()
    cache.update(torch.randn(1, heads, N, 16), torch.randn(1, heads, N, 16), 0)
    with pytest.raises(KVCacheError, match=problem):
        mpass.compress(cache, select(*[some_positions(1)] * heads), compact=model)
    assert cache.layers[0].keys.shape[2] == N
