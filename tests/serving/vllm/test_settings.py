"""What the user gives vLLM for the plugin, and the plan that it makes of a layer."""

from __future__ import annotations

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mpass
from mpass.config import SparseConfig
from mpass.config.promise import most_lost, pattern_for_loss
from mpass.errors import (
    ConfigMismatchError,
    EngineSettingError,
    OptionValueError,
    UnknownOptionError,
    UnknownPatternError,
)
from mpass.serving.vllm.settings import (
    LayerFacts,
    check_settings,
    describe,
    plan_layer,
    read_settings,
)

FACTS = LayerFacts(
    layer=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=64,
    dtype=torch.bfloat16,
    device="cpu",
    total_kv_heads=2,
    num_layers=2,
)
SIZES = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4)
NINE = SparseConfig(
    layers={1: [mpass.AShape(64, 64 * (head + 1)) for head in range(9)]}, num_layers=2, num_heads=9
)


def settings(model="", **given):
    return read_settings({"minference": given, "other plugin": 1}, str(model))


def inline(config):
    """A config as it stands in JSON of a command line."""
    return json.loads(config.to_json())


def test_nothing_given_is_the_built_in_default():
    for nothing in (None, {}, {"minference": None}, {"minference": {}}):
        plan = plan_layer(FACTS, read_settings(nothing, ""))
        assert {pattern.name for pattern in plan.patterns} == {"union"}
        assert (plan.least.keys, plan.least.queries) == (2048, 128)
        assert plan.source == "the built-in default" and plan.reason == ""


def test_a_pattern_is_given_to_every_head():
    plan = plan_layer(FACTS, settings(pattern="a_shape(64, 128)", min_seq_len=500))
    assert plan.patterns == (mpass.AShape(64, 128),) * 4
    assert plan.least.keys == 500
    assert plan.source == "additional_config['minference']['pattern']"


def test_a_config_may_be_a_file_or_stand_in_the_settings(tmp_path):
    config = SparseConfig(layers={1: ["a_shape", "dense", "union", "a_shape"]}, min_seq_len=300)
    config.save(tmp_path / "config.json")
    for given in (str(tmp_path / "config.json"), inline(config)):
        plan = plan_layer(FACTS, settings(config=given))
        assert [pattern.name for pattern in plan.patterns] == [
            "a_shape",
            "dense",
            "union",
            "a_shape",
        ]
        assert plan.least.keys == 300


def test_the_config_beside_the_model_fills_what_the_settings_leave_open(tmp_path):
    shipped = SparseConfig(layers={1: {0: "dense"}}, default="a_shape", min_seq_len=700)
    shipped.save(tmp_path / "minference.json")
    plan = plan_layer(FACTS, settings(tmp_path))
    assert [pattern.name for pattern in plan.patterns] == ["dense", "a_shape", "a_shape", "a_shape"]
    assert plan.least.keys == 700 and plan.source == str(tmp_path / "minference.json")
    given = settings(tmp_path, pattern="union", min_seq_len=900)
    plan = plan_layer(FACTS, given)
    assert {pattern.name for pattern in plan.patterns} == {"union"} and plan.least.keys == 900


def test_a_promised_loss_stands_in_the_place_of_what_comes_with_the_model(tmp_path):
    SparseConfig(default="a_shape").save(tmp_path / "minference.json")
    plan = plan_layer(FACTS, settings(tmp_path, max_loss=0.02))
    assert plan.most_lost == most_lost(0.02) < 1
    assert plan.patterns == (pattern_for_loss(0.02),) * 4
    assert plan.source == "additional_config['minference']['max_loss'] = 0.02"


def test_each_rank_takes_its_own_heads_of_a_config():
    facts = replace(FACTS, num_heads=3, num_kv_heads=1, ranks=3, total_kv_heads=3)
    given = settings(config=inline(NINE))
    found = [plan_layer(replace(facts, rank=rank), given).patterns for rank in range(3)]
    assert [pattern.window_size for part in found for pattern in part] == [
        64 * n for n in range(1, 10)
    ]


def test_a_config_of_another_model_is_refused_on_every_rank():
    few = SparseConfig(layers={1: {0: "a_shape", 5: "dense"}})
    for config in (NINE, few):
        given = settings(config=inline(config))
        with pytest.raises(ConfigMismatchError, match=r"additional_config\['minference'\]"):
            check_settings(given, SIZES)
        for rank in range(2):
            facts = replace(FACTS, num_heads=2, num_kv_heads=1, rank=rank, ranks=2)
            with pytest.raises(ConfigMismatchError, match="layer 1 has 4 query heads"):
                plan_layer(facts, given)
    with pytest.raises(ConfigMismatchError, match="2 layers, the config is for 30"):
        check_settings(settings(config=inline(SparseConfig(num_layers=30))), SIZES)


@pytest.mark.parametrize(
    "given, error, says",
    [
        ({"patern": "union"}, EngineSettingError, "did you mean 'pattern'"),
        ({"inner_backend": "eager"}, UnknownOptionError, "additional_config"),
        ({"pattern": "unoin"}, UnknownPatternError, "union"),
        ({"min_seq_len": -1}, OptionValueError, "min_seq_len"),
        ({"enabled": "no"}, OptionValueError, "true or false"),
        ({"dense_above": "much"}, OptionValueError, "dense_above"),
    ],
    ids=["typing error", "not for engines", "pattern", "length", "flag", "share"],
)
def test_a_wrong_setting_is_named(given, error, says):
    with pytest.raises(error, match=says):
        settings(**given)


def test_settings_that_are_no_mapping_are_refused_and_false_switches_off():
    with pytest.raises(OptionValueError, match="mapping"):
        read_settings({"minference": "union"}, "")
    plan = plan_layer(FACTS, read_settings({"minference": False}, ""))
    assert plan.reason == "switched off"


@pytest.mark.parametrize(
    "changes, given, reason",
    [
        ({"obstacle": "ALiBi"}, {}, "ALiBi"),
        ({"layer": 2}, {}, "a layer of a draft model"),
        ({"head_dim": 512}, {}, "head_dim 512 is over 256"),
        ({}, {"enabled": False}, "switched off"),
        ({}, {"pattern": "dense"}, "the config keeps every head dense"),
    ],
    ids=["obstacle", "draft", "head_dim", "off", "dense"],
)
def test_what_keeps_a_layer_with_the_engine_is_said(changes, given, reason):
    assert plan_layer(replace(FACTS, **changes), settings(**given)).reason == reason


def test_the_report_says_which_layers_are_sparse_and_why_others_are_not():
    given = settings(pattern="a_shape(64, 128)")
    plans = [plan_layer(replace(FACTS, layer=layer, num_layers=9), given) for layer in range(3)]
    plans.append(plan_layer(replace(FACTS, layer=3, num_layers=9, obstacle="ALiBi"), given))
    text = describe(plans)
    assert text.startswith("layers 0-2 are sparse from 2048 keys on: a_shape(64, 128")
    assert text.endswith("layers 3 are vLLM's own: ALiBi")
