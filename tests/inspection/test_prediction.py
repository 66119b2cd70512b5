"""Predicted times of a model on a GPU that is not here: `mpass explain --device h100`."""

from __future__ import annotations

import json
import sys

import pytest
import torch

import mpass
from mpass.cli.app import main
from mpass.errors import ConfigMismatchError, ModelNotFoundError
from mpass.inspection.prediction import predict_model
from mpass.lowering.triton.chips import CHIPS
from mpass.options import parse_options


@pytest.fixture
def folder(tmp_path):
    """A configuration without weights: nothing may load them."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    sizes = {"hidden_size": 4096, "num_hidden_layers": 6, "vocab_size": 99}
    sizes |= {"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
    windows = ["sliding_attention"] * 4 + ["full_attention"] * 2
    config = transformers.Gemma3TextConfig(**sizes, sliding_window=1024, layer_types=windows)
    config.save_pretrained(tmp_path)
    return tmp_path


def predicted(folder, *lengths, chip="h200", **options):
    options = parse_options(None, options)
    return predict_model(folder, CHIPS[chip], options, lengths=lengths, dtype=torch.bfloat16)


def test_layers_that_cost_the_same_are_one_row_per_length(folder):
    found = predicted(folder, 4096, 131072)
    assert [(layer.layers, layer.length) for layer in found.layers] == [
        (4, 4096),
        (2, 4096),
        (4, 131072),
        (2, 131072),
    ]
    assert [layer.runs for layer in found.layers] == ["dense", "dense", "sparse", "sparse"]
    assert found.layers[2].patterns == "dense" and "union" in found.layers[3].patterns
    assert found.layers[0].reason.startswith("4096 keys, sparse from ")
    window, whole = found.layers[2:]
    assert window.density < whole.density < 0.15
    parts = whole.estimate_ms + whole.plan_ms + whole.attention_ms
    assert whole.sparse_ms == pytest.approx(max(parts, whole.host_ms))


def test_the_total_is_that_of_what_would_run(folder):
    found = predicted(folder, 4096, 131072)
    dense, chosen = found.totals(4096)
    assert dense == chosen == pytest.approx(6 * found.layers[0].dense_ms)
    dense, chosen = found.totals(131072)
    expected = 4 * found.layers[2].sparse_ms + 2 * found.layers[3].sparse_ms
    assert chosen == pytest.approx(expected) and chosen < dense / 4


def test_options_and_configs_say_which_patterns_and_from_when(folder):
    config = mpass.SparseConfig("a_shape", {5: "dense"}, min_seq_len=100)
    found = predicted(folder, 4096, config=config)
    assert [layer.runs for layer in found.layers] == ["sparse", "sparse", "dense"]
    assert found.layers[2].reason == "the config keeps every head of this layer dense"
    (window, whole) = predicted(folder, 4096, pattern="union", min_seq_len=5000).layers
    assert window.reason == whole.reason == "4096 keys, sparse from 5000 on"
    with pytest.raises(ConfigMismatchError, match="the config is for 7"):
        predicted(folder, 4096, config=mpass.SparseConfig(num_kv_heads=7))


def test_it_says_that_it_is_a_prediction_and_what_of(folder):
    text = " ".join(str(predicted(folder, 8192, chip="h100")).split())
    assert "PREDICTED for h100" in text and "no GPU was asked" in text
    assert "nobody has measured them on this chip" in text
    assert "its rates were measured on NVIDIA H200" in str(predicted(folder, 8192))


def test_a_model_without_heads_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    transformers.MambaConfig(num_hidden_layers=2).save_pretrained(tmp_path)
    with pytest.raises(ModelNotFoundError, match="does not say what its attention is"):
        predicted(tmp_path, 4096)


def call(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["mpass", "explain", *map(str, arguments)])
    main()


def test_the_command_prints_and_saves_it(folder, tmp_path, monkeypatch, capsys):
    path = tmp_path / "prediction.json"
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, folder, "--device=B200", "--length=8192,131072", "-o", path)
    assert not ended.value.code
    said = capsys.readouterr().out
    assert "PREDICTED for b200" in said and "131072 tokens: all attention" in said
    saved = json.loads(path.read_text())
    assert saved["predicted"] is True and saved["chip"]["name"] == "b200"
    assert {layer["length"] for layer in saved["layers"]} == {8192, 131072}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--device=h101"], "to predict times: a100, h100, h200, b200, l40s, mi300x, rtx4090"),
        (["--device=h100", "--length=8192,x"], "several separated by commas"),
        (["--device=cpu", "--length=8192,16384"], "one number of tokens where the model runs"),
        (["--device=h100", "--output=page.html"], "a prediction has no page"),
        (["--device=h100", "--dtype=fp32"], "bf16 or fp16"),
    ],
)
def test_the_command_refuses_what_cannot_be_predicted(
    folder, arguments, words, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as ended:
        call(monkeypatch, folder, *arguments)
    assert ended.value.code == 2
    assert words in " ".join(capsys.readouterr().err.split())


def test_the_command_s_help_names_every_chip(monkeypatch, capsys):
    with pytest.raises(SystemExit):
        call(monkeypatch, "--help")
    said = "".join(capsys.readouterr().out.split())
    assert all(name in said for name in CHIPS)
