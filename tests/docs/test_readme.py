"""What README and docs/first_steps.md show is what is printed; `make walk` uses a wheel."""

from __future__ import annotations

import contextlib
import io
import sys
from dataclasses import replace

import pytest
import torch

from mpass.cli.app import main
from mpass.patterns.base import registry
from tests.examples.test_examples import WORDS, save_tiny_llama
from tests.helpers.readme import Step, difference, first_steps, program_of_readme

STEPS = first_steps()


@pytest.fixture
def in_a_folder(tmp_path, monkeypatch):
    """An empty folder to work in, and no pattern of it left behind."""
    known = dict(registry._registry)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("log_sparse", None)
    registry._registry.clear()
    registry._registry.update(known)


def called(line: str, monkeypatch) -> str:
    """What a command of mpass prints. The file that it loaded is not loaded again by a program."""
    monkeypatch.setattr(sys, "argv", line.split())
    with contextlib.redirect_stdout(io.StringIO()) as out, pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code in (0, None)
    sys.modules["log_sparse"] = sys.modules["mpass_checked_log_sparse"]
    return out.getvalue()


@pytest.mark.usefixtures("fresh_dynamo")
def test_first_steps_print_what_the_page_shows(in_a_folder, monkeypatch):
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, *_, **__: gm.forward)
    names: dict[str, object] = {"__name__": "first_steps"}
    compared = 0
    for step in STEPS:
        if step.kind == "save":
            (in_a_folder / step.name).write_text(step.text)
            continue
        if step.kind == "call":
            if step.text.startswith("pip "):
                continue
            printed = called(step.text, monkeypatch)
        else:
            with contextlib.redirect_stdout(io.StringIO()) as out, torch.enable_grad():
                exec(compile(step.text, "first_steps.md", "exec"), names)
            printed = out.getvalue()
        assert not (fault := difference(step, printed)), fault
        compared += step.shown is not None
    assert compared == 5


@pytest.mark.usefixtures("fresh_dynamo")
def test_readmes_ten_lines_make_a_model_sparse(in_a_folder, monkeypatch):
    from torch._inductor import compile_fx

    monkeypatch.setattr(compile_fx, "compile_fx", lambda gm, *_, **__: gm.forward)
    save_tiny_llama(in_a_folder)
    prompt = " ".join(WORDS[i % len(WORDS)] for i in range(2100))
    program = program_of_readme()
    assert len(program.split("\n\n")[-1].splitlines()) + 2 <= 10
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(program, "README.md", "exec"), {"folder": in_a_folder, "prompt": prompt})
    assert "sparse" in out.getvalue() and "attention layers, union" in out.getvalue()


def test_output_that_differs_is_shown():
    step = Step("run", "print(1)", shown="1\n")
    assert difference(step, "1\n") == ""
    assert "2" in difference(step, "2\n")
    assert difference(replace(step, shown="a ... c\n"), "a b c \n") == ""
