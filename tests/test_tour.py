"""The tour runs as it stands, and prints what it says that it prints."""

from __future__ import annotations

import contextlib
import io
import re

import pytest
import torch

from tests.helpers.paths import ROOT

TOUR = ROOT / "docs" / "tour.md"
BLOCK = re.compile(r"^```(python|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.usefixtures("fresh_dynamo")
def test_the_tour_prints_what_it_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "tour"}
    said, compared = "", 0
    for kind, text in BLOCK.findall(TOUR.read_text(encoding="utf-8")):
        if kind == "text":
            assert said == text
            compared += 1
            continue
        with contextlib.redirect_stdout(io.StringIO()) as out, torch.enable_grad():
            exec(compile(text, str(TOUR), "exec"), names)
        said = out.getvalue()
    assert compared == 4
