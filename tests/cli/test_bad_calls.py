"""Bad input ends every command with one clear line and status 2, before any work."""

from __future__ import annotations

import itertools
import random
import sys
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import pytest
from typer.models import ArgumentInfo, OptionInfo

from mpass.cli.app import COMMANDS, main
from mpass.cli.evaluate import evaluate

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
OF_A_MODEL = ["explain", "doctor", "profile"]

GENERATED = [
    [command, "smollm2", f"{option}={value}"]
    for command, (option, values) in itertools.product(OF_A_MODEL, BAD_VALUES.items())
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
    ["demo", "--inner-backend=gcc"],
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


DRAWN = 120
"""Calls that are drawn from what the commands themselves say of their options."""

POSITIONAL = {"draw": ["a_shape"], "check": ["a_shape"]} | {
    name: ["smollm2"] for name in ("explain", "doctor", "profile", "calibrate", "eval")
}


WRITTEN = {"--output", "--picture", "--state"}
READ = {"--config", "--text", "--held-out"}
PATTERNS = {"--pattern", "--patterns", "--beside"}


def options_of(command) -> dict[str, object]:
    """The options of a command with their types, as its function has them."""
    found = {}
    for name, annotation in get_type_hints(command, include_extras=True).items():
        if get_origin(annotation) is Annotated:
            kind, *more = get_args(annotation)
            info = next(each for each in more if isinstance(each, OptionInfo | ArgumentInfo))
            if isinstance(info, OptionInfo):
                spelled = [word for word in info.param_decls or () if word.startswith("--")]
                found[spelled[0] if spelled else f"--{name.replace('_', '-')}"] = kind
    return found


def bad_values(option: str, kind: object) -> list[str]:
    """Values that an option cannot take, whatever the command does with it; none for flags."""
    if option in WRITTEN:
        return ["/", "/nowhere/made.json", "/proc/made.json"]
    if option == "--plots":
        return ["/proc/made", "/proc/self/mem"]
    if option in READ:
        return ["/", "/nowhere/there.json", "", "\0"]
    if option in PATTERNS:
        return ["unoin", "a_shape(", "a_shape(-3)", "a_shape(1e99)", "\0", "9" * 99]
    if option == "--device" or Literal in (get_origin(kind), *map(get_origin, get_args(kind))):
        return ["nonsense", "\0"]
    if {int, float} & {kind, *get_args(kind)}:
        return ["many", "1e9x", "0x", ""]
    return []


def drawn_calls() -> list[list[str]]:
    """Calls with one to three bad values, the same in each run."""
    generator = random.Random(26)
    known = {
        command.__name__.replace("evaluate", "eval"): [
            (option, bad)
            for option, kind in options_of(command).items()
            for bad in bad_values(option, kind)
        ]
        for command in (*COMMANDS, evaluate)
    }
    calls = []
    while len(calls) < DRAWN:
        name = generator.choice(sorted(known))
        chosen = dict(generator.sample(known[name], generator.randint(1, 3)))
        given = [f"{option}={bad}" for option, bad in chosen.items()]
        calls.append([name, *POSITIONAL.get(name, []), *given])
    return calls


def test_drawn_calls_reach_every_command_and_most_options():
    drawn = [(call[0], word.partition("=")[0]) for call in drawn_calls() for word in call[1:]]
    assert {name for name, _ in drawn} == {c.__name__ for c in COMMANDS} | {"eval"}
    assert len(set(drawn)) > 50


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


CALLS = [*GENERATED, *BY_HAND, *drawn_calls()]


@pytest.mark.parametrize("arguments", CALLS, ids=lambda call: repr(" ".join(call))[:60])
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


@pytest.mark.parametrize(
    "arguments",
    [
        ["coverage", "--family=llama", "--spelling=sdpa", "--scenario=no_cache"],
        ["explain", "smollm2"],
        ["demo"],
        ["calibrate", "smollm2"],
    ],
    ids=lambda call: call[0],
)
def test_a_package_that_is_missing_is_named_with_what_brings_it(
    arguments, monkeypatch, capsys, tmp_path
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.setattr(sys, "argv", ["mpass", *arguments])
    with pytest.raises(SystemExit) as ended:
        main()
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "transformers is not installed" in said and "pip install 'mpass[models]'" in said
