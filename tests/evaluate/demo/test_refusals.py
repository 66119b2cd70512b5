"""The demo refuses bad settings before a model is loaded."""

from __future__ import annotations

import dataclasses

import pytest

import mpass
from mpass.errors import (
    ConfigFileError,
    ConfigMismatchError,
    DeviceError,
    DtypeError,
    OptionValueError,
    PatternValueError,
    TextTooShortError,
    UnknownPatternError,
    UnknownTextError,
)
from mpass.evaluate import demo
from mpass.evaluate.demo import DemoSettings, check_settings, run_demo
from tests.helpers.requirements import needs_smollm2


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pattern": "vertical_slsh"}, UnknownPatternError),
        ({"pattern": "vertical_slash(-1, 5)"}, PatternValueError),
        ({"pattern": "block_sparse(0)"}, PatternValueError),
        ({"pattern": "block_sparse(top=3)"}, OptionValueError),
        ({"pattern": "1 + 1"}, OptionValueError),
        ({"pattern": "a_shape("}, OptionValueError),
        ({"pattern": "dense", "config": "CONFIG"}, OptionValueError),
        ({"config": "no/such/file"}, ConfigFileError),
        ({"dtype": "fp8"}, DtypeError),
        ({"device": "tpu9"}, DeviceError),
        ({"length": 0}, OptionValueError),
        ({"length": -8}, OptionValueError),
        ({"repeats": 0}, OptionValueError),
        ({"new_tokens": -1}, OptionValueError),
        ({"min_seq_len": -1}, OptionValueError),
        ({"inner_backend": "gcc"}, OptionValueError),
        ({"text": "no/such/file"}, UnknownTextError),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(change, error, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_model", forbidden)
    monkeypatch.setattr(demo, "load_tokenizer", forbidden)
    mpass.SparseConfig("dense").save(tmp_path / "config.json")
    settings = DemoSettings(**change)
    if settings.config == "CONFIG":
        settings = dataclasses.replace(settings, config=str(tmp_path / "config.json"))
    with pytest.raises(error):
        check_settings(settings)
    with pytest.raises(error):
        run_demo(settings)


def forbidden(*arguments, **options):
    raise AssertionError("a model was loaded")


@needs_smollm2
def test_a_text_shorter_than_the_prompt_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "load_model", forbidden)
    file = tmp_path / "short.txt"
    file.write_text("far too short")
    with pytest.raises(TextTooShortError):
        run_demo(DemoSettings(text=str(file)))
    file.write_text(" \n")
    with pytest.raises(UnknownTextError, match="empty"):
        run_demo(DemoSettings(text=str(file)))


@needs_smollm2
@pytest.mark.parametrize(
    "config",
    [
        mpass.SparseConfig("a_shape", num_layers=31),
        mpass.SparseConfig("a_shape", num_heads=8),
        mpass.SparseConfig("a_shape", {3: ["dense"] * 10}),
    ],
)
def test_a_config_for_another_model_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_model", forbidden)
    file = tmp_path / "config.json"
    config.save(file)
    with pytest.raises(ConfigMismatchError):
        run_demo(DemoSettings(config=str(file)))


@needs_smollm2
def test_a_prompt_beyond_the_models_positions_is_refused(monkeypatch):
    monkeypatch.setattr(demo, "load_model", forbidden)
    with pytest.raises(OptionValueError, match="at most 8192"):
        run_demo(DemoSettings(length=8193))
