"""What notebooks show, and what a program is told that compiled nothing."""

from __future__ import annotations

import html.parser

import pytest
import torch

import mpass
from mpass.inspection.profiling import profile
from tests.helpers.processes import run_python
from tests.helpers.toys import Decoder

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

FIRST_FORM = """
import torch
from torch import nn

class Model(nn.Module):
    def forward(self, x):
        return nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)

    def generate(self, x):
        return self(x)

model = torch.compile(Model(), backend="minference")
with torch.no_grad():
    model.{method}(torch.randn(1, 2, 64, 16))
"""

IMPORTED = "import mpass.backend, mpass; mpass.AShape(1, 64)"


class Cells(html.parser.HTMLParser):
    """Balanced elements and all text."""

    def __init__(self, text):
        super().__init__()
        self.open, self.words = [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        if tag != "br":
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


def test_the_first_form_that_people_type_is_told_that_it_compiled_nothing():
    said = run_python("-c", FIRST_FORM.format(method="generate")).stderr
    assert "nothing was compiled" in said and 'model.compile(backend="minference")' in said


@pytest.mark.parametrize("program", [FIRST_FORM.format(method="forward"), IMPORTED])
def test_who_compiles_or_only_imports_is_told_nothing(program):
    program = program.replace("model.forward(", "model(")
    assert "nothing was compiled" not in run_python("-c", program).stderr


def test_reports_profiles_diagnoses_and_patterns_are_tables_in_a_notebook():
    options = {"min_seq_len": 64, "pattern": "a_shape(4, 64)", "dense_above": 2.0}
    model, x = Decoder(depth=2).eval(), torch.randn(1, 128, 32)
    with torch.no_grad():
        done = profile(model, x, options=options)
        torch.compile(model, backend="minference", options=options | {"inner_backend": "eager"})(x)
    for shown, words in (
        (mpass.last_report(), "a_shape"),
        (done, "recall"),
        (done.explanation, "a_shape"),
        (mpass.diagnose(done.explanation), "ran sparse"),
        (mpass.AShape(4, 64), "sink_size"),
    ):
        text = " ".join(Cells(shown._repr_html_()).words)
        assert words in text and "\n\n" not in text
    assert "<table>" in mpass.last_report()._repr_html_()


def test_text_of_a_report_is_escaped():
    site = mpass.Report((), 0, notes=("<script>alert(1)</script>",))
    assert "<script>" not in site._repr_html_()
