"""Results go where they are asked for, alike in every command."""

from __future__ import annotations

import importlib
import json
import os
import re

import pytest
import torch
from typer.main import get_command
from typer.testing import CliRunner

import mpass
from mpass.cli import prompt
from mpass.cli.app import COMMANDS, app
from mpass.inspection.doctor import diagnose
from mpass.patterns.base import registered_patterns
from tests.helpers.paths import ROOT
from tests.helpers.toys import Decoder

WITHOUT_RESULT = {"serve", "pattern"}
"""A command that runs until it is stopped, and a group of other commands."""

CHEAP = [
    ["env"],
    ["patterns"],
    ["draw", "a_shape", "--tokens=128"],
    ["check", "dense"],
    ["coverage", "--family=llama", "--spelling=sdpa", "--scenario=no_cache"],
    ["explain", "MODEL", "--length=64", "--dtype=fp32", "--text=TEXT"],
    ["doctor", "MODEL", "--length=64", "--dtype=fp32", "--text=TEXT"],
]


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """A tiny model with a tokenizer in a folder, and a text for it."""
    from tests.examples.test_examples import save_tiny_llama

    folder = tmp_path_factory.mktemp("model")
    save_tiny_llama(folder)
    text = folder / "text.txt"
    text.write_text(" ".join(f"w{i % 60}" for i in range(200)))
    return {"MODEL": str(folder), "TEXT": str(text)}


def call(arguments, places):
    torch._dynamo.reset()
    for name, place in places.items():
        arguments = [word.replace(name, place) for word in arguments]
    return CliRunner().invoke(app, arguments)


@pytest.mark.parametrize("arguments", CHEAP, ids=lambda words: words[0])
def test_json_and_a_dash_write_one_json_value_to_standard_output(arguments, places, tmp_path):
    printed = call([*arguments, "--json"], places)
    assert printed.exit_code == 0, printed.output
    found = json.loads(printed.stdout)
    assert found
    file = tmp_path / "saved.json"
    saved = call([*arguments, "-o", str(file), "--json"], places)
    assert json.loads(saved.stdout) and "Saved" in saved.stderr
    dash = call([*arguments, "-o", "-"], places)
    if arguments[0] == "draw":
        assert dash.stdout == file.read_text()
        assert dash.stdout.startswith("<svg")
    else:
        assert type(json.loads(dash.stdout)) is type(found)
        assert json.loads(file.read_text()).__class__ is found.__class__


def test_every_command_spells_its_options_alike():
    commands = get_command(app).commands
    assert set(commands) - WITHOUT_RESULT == {command.__name__ for command in COMMANDS} | {"eval"}
    for name, command in commands.items():
        if name in WITHOUT_RESULT:
            continue
        spelled = {word for option in command.params for word in option.opts}
        assert {"--json", "--output", "-o"} <= spelled, name
        for plural, one in (("--patterns", "--pattern"), ("--lengths", "--length")):
            assert plural not in spelled or one in spelled, name


def test_choices_are_shown_and_refused_with_the_choices():
    shown = CliRunner().invoke(app, ["demo", "--help"], env={"COLUMNS": "160"}).output
    assert "bf16|fp16|fp32" in shown and "inductor|aot_eager|eager" in shown
    refused = CliRunner().invoke(app, ["demo", "--dtype", "int4"])
    assert refused.exit_code == 2 and "bf16" in refused.output


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        ("mpass do", {"doctor"}),
        ("mpass explain smo", {"smollm2"}),
        ("mpass explain smollm2 --device h", {"h100", "h200"}),
        ("mpass demo --pattern a_", {"a_shape"}),
        ("mpass demo --dtype b", {"bf16"}),
        ("mpass coverage --spelling fl", {"flex_attention"}),
    ],
)
def test_a_shell_completes_names(typed, completed):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1)}
    env = {**os.environ, "_MPASS_COMPLETE": "complete_bash", **words}
    found = CliRunner().invoke(app, [], prog_name="mpass", env=env)
    assert set(found.output.split()) == completed


def test_completed_patterns_are_those_that_mpass_has():
    own = {
        name for name, cls in registered_patterns().items() if cls.__module__.startswith("mpass.")
    }
    assert set(prompt.PATTERNS) == own


def test_every_command_has_a_function_in_the_documentation():
    page = (ROOT / "docs" / "usage.md").read_text()
    rows = dict(re.findall(r"^\| `mpass (\w+)` \|.*\| `([\w.]+)` \|$", page, re.MULTILINE))
    assert set(rows) == set(get_command(app).commands) - WITHOUT_RESULT
    for path in rows.values():
        module, _, name = path.rpartition(".")
        assert callable(getattr(importlib.import_module(module), name))


def test_a_diagnosis_groups_attentions_by_cause_with_a_remedy():
    torch._dynamo.reset()
    model = Decoder(depth=3).eval()
    options = {"min_seq_len": 64, "config": mpass.SparseConfig("a_shape", layers={1: "dense"})}
    options |= {"dense_above": 2.0}
    with torch.no_grad():
        found = diagnose(mpass.explain(model, torch.randn(1, 256, 32), options=options))
    assert (found.attentions, found.sparse) == (3, 2)
    dense = found.findings[0]
    assert (dense.kind, dense.where, dense.count) == ("change", "layer 1", 1)
    assert "change the config" in dense.remedy and "toys.py" in dense.source
    assert "[right] 2 x ran sparse (layers 0, 2)" in str(found)


def test_a_diagnosis_says_what_kept_a_planned_attention_dense():
    torch._dynamo.reset()
    with torch.no_grad():
        explained = mpass.explain(
            Decoder(depth=2).eval(),
            torch.randn(1, 256, 32),
            options={"min_seq_len": 64, "pattern": "a_shape(64, 256)", "dense_above": 0.1},
        )
    found = diagnose(explained)
    assert found.sparse == 0
    (change,) = found.changes
    assert change.what.startswith("planned sparse, ran dense") and change.count == 2
    assert "smaller budget" in change.remedy


def test_a_diagnosis_of_a_model_without_attention_says_so():
    torch._dynamo.reset()
    found = diagnose(mpass.explain(torch.nn.Linear(4, 4), torch.zeros(1, 4)))
    assert "no attention" in found.changes[0].what


def test_a_missing_compiler_is_a_finding(monkeypatch):
    import mpass.lowering.cpu.support as support

    torch._dynamo.reset()
    with torch.no_grad():
        explained = mpass.explain(
            Decoder(depth=1).eval(), torch.randn(1, 128, 32), options={"min_seq_len": 64}
        )
    monkeypatch.setattr(support, "machine_reason", lambda: "no C++ compiler was found")
    monkeypatch.setenv("MPASS_CACHE", "/proc/nowhere/mpass")
    said = str(diagnose(explained))
    assert "no C++ compiler was found" in said and "CXX" in said
