"""What is shown while kernels and other compilers are at work."""

from __future__ import annotations

import io
import re
import sys
import threading
import time

import pytest
import torch

import mpass
from mpass import warm_up
from mpass.lowering.activity import Activity, activity
from mpass.lowering.cpu import library
from tests.helpers.cpu_cases import needs_kernels


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Notebook(io.StringIO):
    """As ipykernel's stream, whose module tells what it is."""

    __module__ = "ipykernel.iostream"


def shown(monkeypatch, stream, after=0.0):
    monkeypatch.setattr(sys, "stderr", stream)
    return Activity(after)


def wait_for(stream, words):
    for _ in range(200):
        if words in stream.getvalue():
            return
        time.sleep(0.02)
    raise AssertionError(f"{words!r} not in {stream.getvalue()!r}")


def test_a_terminal_has_one_line_that_goes_away(monkeypatch):
    terminal = Terminal()
    now = shown(monkeypatch, terminal)
    first, second = now.expect("attention"), now.expect("union")
    with now.build("attention", first):
        pass
    with now.stage("Inductor"), now.build("union", second):
        wait_for(terminal, "kernels 1 of 2, Inductor, ")
    text = terminal.getvalue()
    assert "\n" not in text and text.startswith("\rmpass: compiling: ")
    assert text.endswith("\r\x1b[K")
    assert now.text() == ""


def test_a_notebook_has_no_escape_codes_and_nothing_is_left_of_the_line(monkeypatch):
    notebook = Notebook()
    now = shown(monkeypatch, notebook)
    with now.stage("Inductor"):
        wait_for(notebook, "Inductor")
    assert "\x1b" not in notebook.getvalue()
    assert re.fullmatch(r"\r +\r", notebook.getvalue()[notebook.getvalue().rindex(" s") + 2 :])


def test_a_log_has_a_line_for_each_kernel_that_takes_long(monkeypatch):
    log = io.StringIO()
    now = shown(monkeypatch, log, after=0.05)
    with now.stage("Inductor"), now.build("union, bfloat16"):
        wait_for(log, "union")
        time.sleep(0.7)  # it is looked at again, and not told again
    assert log.getvalue() == "mpass: compiling a kernel (union, bfloat16)\n"


@pytest.mark.parametrize("stream", [Terminal, Notebook, io.StringIO])
def test_what_is_quick_is_not_told(monkeypatch, stream):
    stream = stream()
    now = shown(monkeypatch, stream, after=0.3)
    with now.build("union"), now.stage("Inductor"):
        pass
    time.sleep(0.4)
    assert stream.getvalue() == ""


def test_the_environment_switches_it_off(monkeypatch):
    monkeypatch.setenv("MPASS_PROGRESS", "0")
    terminal = Terminal()
    with shown(monkeypatch, terminal).build("union"):
        time.sleep(0.1)
    assert terminal.getvalue() == ""


def test_a_kernel_that_another_one_needs_is_part_of_it():
    now = Activity(60)
    with now.build("union"), now.build("fixed_budget"):
        assert now.text() == "kernels 0 of 1, 0 s"
    with now.build("a_shape"):  # a new batch counts from the beginning
        assert now.text() == "kernels 0 of 1, 0 s"


def test_a_command_shows_it_in_its_own_progress(monkeypatch):
    terminal, told = Terminal(), []
    now = shown(monkeypatch, terminal)
    with now.show_by(told.append), now.stage("Inductor"):
        while not told:
            time.sleep(0.02)
    assert told[0] == "Inductor, 0 s" and told[-1] == "" and terminal.getvalue() == ""


def test_a_stream_that_is_closed_fails_nothing(monkeypatch):
    closed = Terminal()
    closed.close()
    now = shown(monkeypatch, closed)
    with now.stage("Inductor"):
        time.sleep(0.1)
    assert now.text() == ""


def test_an_error_ends_what_was_at_work():
    now = Activity(60)
    with pytest.raises(RuntimeError), now.stage("Inductor"), now.build("union"):
        raise RuntimeError
    assert now.text() == ""


@needs_kernels
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_first_compile_tells_its_kernels_and_its_inner_compiler(monkeypatch):
    seen: list[str] = []
    told = threading.Event()
    original = library.compile_source

    def compile_source(source, **options):
        told.wait(30)  # no kernel is done before the inner compiler has looked
        return original(source, **options)

    def looking(gm, inputs):
        seen.append(activity().text())
        told.set()
        return gm.forward

    for function in (warm_up.start_attention, warm_up.start_estimator, library.load_library):
        function.cache_clear()
    monkeypatch.setattr(library, "compile_source", compile_source)
    registry = torch._dynamo.backends.registry
    for table in ("_BACKENDS", "_COMPILER_FNS"):
        monkeypatch.setattr(registry, table, dict(getattr(registry, table)))
    registry.register_backend(looking, name="looking")
    layer = torch.nn.Module()
    layer.forward = lambda x: torch.nn.functional.scaled_dot_product_attention(
        x, x, x, is_causal=True
    )
    options = {"pattern": "a_shape(16, 64)", "min_seq_len": 128, "inner_backend": "looking"}
    with torch.no_grad():
        mpass.compile(layer, **options)(torch.randn(1, 2, 200, 40))
    for function in (warm_up.start_attention, warm_up.start_estimator):
        function.cache_clear()
    (text,) = seen
    assert re.fullmatch(r"kernels [01] of 2, Looking, \d+ s", text)
