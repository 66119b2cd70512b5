"""Tiny configs of transformers' classes: what the rules make of one, and that models are built."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers", reason="builds models of transformers from config")

from mpass.models.classes import ModelClass, build_class, model_classes, tiny_config
from mpass.models.shrink import kept_layers, shares, shrunk


def entry_of(model_type: str, kind: str = "causal") -> ModelClass:
    return next(entry for entry in model_classes((kind,)) if entry.model_type == model_type)


def test_widths_stay_products_of_heads():
    config = tiny_config(entry_of("llama"))
    assert (config.hidden_size, config.num_attention_heads, config.head_dim) == (256, 8, 32)
    assert config.vocab_size == 512 and config.num_hidden_layers == 2


def test_one_layer_of_each_kind_is_kept():
    config = tiny_config(entry_of("gemma3_text"))
    assert config.layer_types == ["sliding_attention", "full_attention"]
    assert config.sliding_window == 16


def test_layers_are_told_apart_by_all_lists_that_speak_of_them():
    kinds = ["a"] * 4 + ["b"] * 2
    flags = [0, 1, 0, 1, 0, 0]
    config = {"num_hidden_layers": 6, "layer_types": kinds, "no_rope_layers": flags}
    assert kept_layers(config) == {-1: 6, 0: 0, 1: 1, 4: 2}
    small = shrunk(config)
    assert small["layer_types"] == ["a", "a", "b"] and small["no_rope_layers"] == [0, 1, 0]


def test_ids_of_special_tokens_stay_apart_and_in_the_vocabulary():
    config = {"image_token_id": 151655, "eos_token_id": [151643, 1], "vocab_size": 151936}
    small = shrunk({**config, "text_config": {"eos_token_id": 151643}})
    assert small["vocab_size"] == 512
    assert small["image_token_id"] != small["eos_token_id"][0] < 512
    assert small["text_config"]["eos_token_id"] == small["eos_token_id"][0]
    assert small["eos_token_id"][1] == 1


@pytest.mark.parametrize(("sections", "total"), [([16, 24, 24], 16), ([11, 11, 10], 8)])
def test_sections_of_rotary_positions_add_up(sections, total):
    assert sum(shares(sections, total)) == total and min(shares(sections, total)) > 0


def test_every_mapping_is_listed_whole():
    from transformers.models.auto import modeling_auto

    assert len(model_classes(("causal",))) == len(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        ("causal", "gpt2"), ("causal", "bert"), ("causal", "deepseek_v3"), ("causal", "jamba"),
        ("causal", "emu3"), ("image-text", "qwen2_vl"), ("encoder-decoder", "t5"),
        ("encoder", "esm"), ("encoder", "modernbert"),
    ],
)  # fmt: skip
def test_a_model_is_small(kind, model_type):
    model = build_class(entry_of(model_type, kind))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e7
