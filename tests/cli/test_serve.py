"""`mpass serve` starts transformers' own server; what is wrong is said in one line before that."""

from __future__ import annotations

import functools
import inspect
import os
import threading

import pytest
import torch
from typer.testing import CliRunner

import mpass
from mpass.cli.app import app
from mpass.errors import ConfigMismatchError, MissingPackageError, UnknownPatternError
from mpass.serving.packed_attention import NAME, PackedAttention
from tests.helpers.toys import tiny_llama

transformers = pytest.importorskip("transformers", reason="needs transformers")
server = pytest.importorskip("transformers.cli.serve", reason="needs transformers' server")
IMPORTS = "transformers.utils.import_utils.is_serve_available"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A model's folder; transformers' attention is as it was afterwards."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    torch.manual_seed(0)
    tiny_llama().save_pretrained(tmp_path)
    monkeypatch.setattr(IMPORTS, lambda: True)
    yield str(tmp_path)
    transformers.AttentionInterface.register(NAME, sdpa_attention_forward)


@pytest.fixture
def started(monkeypatch):
    """What the server was asked for, in the place of one that runs."""
    asked = {}

    class Serve:
        def __init__(
            self,
            force_model: str,
            continuous_batching: bool = False,
            attn_implementation: str = "",
            device: str = "",
            dtype: str = "",
            port: int = 8000,
            cb_num_blocks: int = 0,
        ) -> None:
            given = locals()
            asked.update({name: given[name] for name in inspect.signature(Serve).parameters})
            asked["attention"] = transformers.AttentionInterface._global_mapping[NAME]

    monkeypatch.setattr(server, "Serve", Serve)
    return asked


def run(*arguments):
    return CliRunner().invoke(app, ["serve", *arguments])


def test_the_server_of_transformers_gets_the_attention_and_its_own_options(folder, started):
    done = run(folder, "--pattern", "a_shape(9, 99)", "--port", "8123", "--cb-num-blocks", "48")
    assert done.exit_code == 0, done.output
    assert folder in done.output.replace("\n", "")  # a long path is broken
    attention = started.pop("attention")
    assert isinstance(attention, PackedAttention)
    assert attention.settings.given.default == mpass.AShape(9, 99)
    assert started == {
        "force_model": folder,
        "continuous_batching": True,
        "attn_implementation": "sdpa",
        "device": "cpu",
        "dtype": "bfloat16",
        "port": 8123,
        "cb_num_blocks": 48,
    }


@pytest.mark.parametrize("of_the_server", [False, True])
def test_the_process_is_ended_for_threads_of_the_server_alone(
    of_the_server, folder, started, monkeypatch
):
    done, ended = threading.Event(), []
    thread = threading.Thread(target=done.wait, daemon=False)
    monkeypatch.setattr(os, "_exit", ended.append)
    if of_the_server:
        plain = server.Serve.__init__

        @functools.wraps(plain)
        def start(*arguments, **options):
            thread.start()
            return plain(*arguments, **options)

        monkeypatch.setattr(server.Serve, "__init__", start)
    else:
        thread.start()
    try:
        assert run(folder).exit_code == 0
    finally:
        done.set()
        thread.join()
    assert ended == ([0] if of_the_server else [])


def test_a_missing_extra_is_named(folder, started, monkeypatch):
    monkeypatch.setattr(IMPORTS, lambda: False)
    done = run(folder)
    assert isinstance(done.exception, MissingPackageError)
    assert "pip install 'mpass[serve]'" in str(done.exception)
    assert started == {}


@pytest.mark.parametrize("where", ["given", "beside the model"])
def test_a_config_of_another_model_is_refused_before_the_server_starts(
    folder, started, where, tmp_path
):
    file = tmp_path / ("minference.json" if where == "beside the model" else "other.json")
    mpass.SparseConfig("a_shape", layers={0: ["dense"] * 9}).save(file)
    done = run(folder, *(["--config", str(file)] if where == "given" else []))
    assert isinstance(done.exception, ConfigMismatchError)
    assert "names 9" in str(done.exception)
    assert started == {}


def test_an_unknown_pattern_is_refused_before_the_model_is_looked_for(started):
    done = run("no/such/folder", "--pattern", "a_shap")
    assert isinstance(done.exception, UnknownPatternError)
    assert started == {}
