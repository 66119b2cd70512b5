"""Bad input ends every command with one clear line and status 2, before any work."""

from __future__ import annotations

import itertools
import sys

import pytest

from mpass.cli.app import main

BAD_VALUES = {
    "--pattern": ["nonsense", "a_shape(", "a_shape(-1)", "a_shape(1, 2, 3, 4)", "a_shape(x=1)", ""],
    "--config": ["/nowhere/config.json", "/", "/proc/self/mem"],
    "--dtype": ["int8", "", "float63"],
    "--length": ["-1", "0", "many", "1e9"],
    "--text": ["/nowhere.txt", "/", ""],
    "--device": ["tpu", "cuda:99", ""],
    "--min-seq-len": ["-5", "x"],
    "--output": ["/nowhere/page.html", "/", "/proc/page.html"],
}
COMMANDS = ["explain", "doctor", "profile"]

GENERATED = [
    [command, "smollm2", f"{option}={value}"]
    for command, (option, values) in itertools.product(COMMANDS, BAD_VALUES.items())
    for value in values
]
BY_HAND = [
    ["explain"],
    ["explain", "/nowhere"],
    ["explain", "/"],
    ["explain", "smollm3"],
    ["profile", "smollm2", "--query-blocks=-1"],
    ["profile", "smollm2", "--query-blocks=x"],
    ["coverage", "--family=nobody"],
    ["coverage", "--spelling=flash"],
    ["coverage", "--scenario=upside_down"],
    ["coverage", "--output=/nowhere/x.json"],
    ["draw"],
    ["draw", "nonsense"],
    ["draw", "a_shape(1.5)"],
    ["draw", "a_shape", "--tokens=0"],
    ["draw", "a_shape", "--tokens=99999999"],
    ["draw", "a_shape", "-o/nowhere/x.svg"],
    ["draw", "a_shape", "-o/proc/x.svg"],
    ["draw", "a_shape(\0)"],
    ["draw", "(" * 500],
    ["draw", "__import__('os')"],
    ["demo", "--model=nobody"],
    ["demo", "--length=0"],
    ["demo", "--length=-4"],
    ["demo", "--repeats=0"],
    ["demo", "--new-tokens=-1"],
    ["demo", "--pattern=nonsense"],
    ["demo", "--pattern=a_shape", "--config=/nowhere.json"],
    ["demo", "--inner-backend=tvm"],
    ["demo", "--dtype=int4"],
    ["demo", "--device=tpu"],
    ["demo", "--text=/nowhere.txt"],
    ["demo", "--output=/nowhere/x.json"],
    ["demo", "-o/proc/x.json"],
    ["demo", "--min-seq-len=-1"],
    ["eval", "--tasks=nonsense"],
    ["eval", "--tasks="],
    ["eval", "--lengths=x"],
    ["eval", "--lengths=-1"],
    ["eval", "--lengths="],
    ["eval", "--patterns=nonsense"],
    ["eval", "--samples=0"],
    ["eval", "--dtype=x"],
    ["eval", "--device=x"],
    ["eval", "--inner-backend=x"],
    ["eval", "--output=/"],
    ["eval", "--output=/nowhere/x"],
    ["eval", "--output=/proc/x"],
    ["eval", "--plots=/proc/self/mem"],
    ["eval", "nobody"],
    ["calibrate"],
    ["calibrate", "nobody"],
    ["calibrate", "smollm2", "--lengths=1"],
    ["calibrate", "smollm2", "--lengths=x"],
    ["calibrate", "smollm2", "--check-lengths=x"],
    ["calibrate", "smollm2", "--retrieval-lengths=3"],
    ["calibrate", "smollm2", "--budget=-1"],
    ["calibrate", "smollm2", "--budget=0"],
    ["calibrate", "smollm2", "--max-loss=-1"],
    ["calibrate", "smollm2", "--retrieval-weight=-1"],
    ["calibrate", "smollm2", "--pattern=nonsense"],
    ["calibrate", "smollm2", "--dtype=x"],
    ["calibrate", "smollm2", "--device=x"],
    ["calibrate", "smollm2", "-o/nowhere/x.json"],
    ["calibrate", "smollm2", "-o/"],
    ["calibrate", "smollm2", "--picture=/nowhere/x.svg"],
    ["calibrate", "smollm2", "--text=/nowhere.txt"],
    ["calibrate", "smollm2", "--held-out=/nowhere.txt"],
    ["check"],
    ["check", "nonsense"],
    ["check", "/nowhere.py:Mine"],
    ["check", "/:Mine"],
    ["nonsense"],
    ["env", "--nonsense"],
    ["env", "-o/nowhere/x.json"],
    ["patterns", "-o/"],
    ["check", "union", "-o/proc/x.json"],
    ["doctor"],
    ["calibrate", "smollm2", "--state=/nowhere/x.state"],
    ["patterns", "extra"],
]


@pytest.fixture
def no_model_is_loaded(monkeypatch):
    """Loading a real model is work that no refusal may come after."""
    import mpass.models.load as load

    real = load.load_model

    def refuse_or_fail(model, **more):
        if model in ("smollm2", "gemma3"):
            pytest.fail("the model was loaded before the input was checked")
        return real(model, **more)

    monkeypatch.setattr(load, "load_model", refuse_or_fail)


@pytest.mark.parametrize("arguments", GENERATED + BY_HAND, ids=lambda call: " ".join(call)[:60])
@pytest.mark.usefixtures("no_model_is_loaded")
def test_a_bad_call_is_refused_in_a_line(arguments, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["mpass", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert "Traceback" not in said
    if said.startswith("mpass: "):
        assert len(said.splitlines()) <= 12
        assert len(said) < 2000
