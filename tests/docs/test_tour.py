"""The tour runs as it stands, and prints what it says that it prints. So does the notebook."""

from __future__ import annotations

import ast
import contextlib
import io
import json
import re
import sys
import types

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


NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_each_last_line_is_a_table(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(path.read_text(encoding="utf-8"))
    module = types.ModuleType("first_look")  # Dynamo looks names up in the module that has them
    monkeypatch.setitem(sys.modules, module.__name__, module)
    names = vars(module)
    tables = 0
    for cell in notebook["cells"]:
        if cell["cell_type"] != "code":
            continue
        assert cell["outputs"] == [], "outputs are made by `make docs`, and not kept"
        tree = ast.parse("".join(cell["source"]))
        shown = tree.body.pop() if isinstance(tree.body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()), torch.enable_grad():
            exec(compile(tree, str(path), "exec"), names)
            if shown is not None:
                value = eval(compile(ast.Expression(shown.value), str(path), "eval"), names)
                tables += "<table>" in value._repr_html_() or "<p>" in value._repr_html_()
    assert tables >= 4
