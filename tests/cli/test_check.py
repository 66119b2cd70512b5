"""`mpass check` on patterns that are right, and on such that are not what they say."""

from __future__ import annotations

import json
import sys

import pytest

from mpass.cli.app import main
from mpass.patterns.base import registry

PATTERN = """
from dataclasses import dataclass
from typing import ClassVar

import sympy

from mpass.patterns.a_shape import AShape
from mpass.patterns.base import LENGTH, register_pattern


@register_pattern
@dataclass(frozen=True)
class Mine(AShape):
    sink_size: int = 4
    window_size: int = 40
    name: ClassVar[str] = "NAME"
BODY
"""

FAULTS = {
    "right": ("", ""),
    "leaves_out": (
        "    @classmethod\n    def select(cls, inputs, patterns):\n"
        "        return AShape.select(inputs, [AShape(4, 300)] * len(patterns))",
        "estimate() leaves out",
    ),
    "sees_later": (
        "    @classmethod\n    def select(cls, inputs, patterns):\n"
        "        return ~AShape.select(inputs, patterns)",
        "which the mask hides",
    ),
    "cost": (
        "    def cost(self):\n        return LENGTH * sympy.Symbol('x')",
        "cost() is 8192*x",
    ),
    "raises": (
        "    @classmethod\n    def estimate(cls, inputs, patterns):\n"
        "        raise ValueError('no')",
        "raises ValueError: no",
    ),
}


@pytest.fixture
def call(monkeypatch, capsys):
    known = registry.registered_patterns()

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["mpass", "pattern", "check", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return ended.value.code, capsys.readouterr().out

    yield run
    registry._registry.clear()
    registry._registry.update(known)


@pytest.mark.parametrize("name", FAULTS)
def test_a_pattern_of_a_file_is_held_against_what_it_says(name, call, tmp_path):
    body, words = FAULTS[name]
    path = tmp_path / "mine.py"
    path.write_text(PATTERN.replace("NAME", f"checked_{name}").replace("BODY", body))
    code, said = call(f"{path}:Mine", "--json")
    found = json.loads(said)
    assert code == bool(words)
    assert words in " ".join(check["fault"] for check in found)
    assert {check["what"] for check in found} >= {"cost", "whole prompt", "batch with padding"}


@pytest.mark.parametrize("name", ["a_shape", "union", "dense"])
def test_patterns_of_mpass_are_right(name, call):
    code, said = call(name)
    assert code == 0, said
    assert f"{name}, whole prompt: right" in said


def test_a_pattern_that_is_checked_is_drawn(call, tmp_path):
    code, said = call("a_shape", "-o", str(tmp_path / "drawn.svg"))
    assert code == 0
    assert "a_shape(128, 1024) at 1024 tokens: density" in said and "██" in said
    assert (tmp_path / "drawn.svg").read_text().startswith("<svg")


def test_a_pattern_that_raises_is_not_drawn(call, tmp_path):
    path = tmp_path / "mine.py"
    body, _ = FAULTS["raises"]
    path.write_text(PATTERN.replace("NAME", "checked_undrawn").replace("BODY", body))
    code, said = call(f"{path}:Mine")
    assert code == 1 and "raises ValueError: no" in said and "█" not in said
