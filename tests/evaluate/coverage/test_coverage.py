"""`mpass coverage`: what it records, and what it refuses before anything runs."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

pytest.importorskip("transformers", reason="builds models of transformers from config")

from mpass.cli.app import app
from mpass.errors import OptionValueError


def test_records_of_one_family_are_printed_and_saved(tmp_path):
    output = tmp_path / "coverage.json"
    options = ["--family", "llama", "--spelling", "sdpa", "--scenario", "no_cache"]
    result = CliRunner().invoke(app, ["coverage", *options, "--output", str(output)])
    assert result.exit_code == 0, result.output
    assert "1 runs, 2 of 2 attentions sparse, 0 differ" in result.output
    (record,) = json.loads(output.read_text())
    assert (record["family"], record["implementation"]) == ("llama", "sdpa")
    assert record["rewritten"] == 2 and record["difference"] <= 1e-4


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--family", "lama"),
        ("--spelling", "flash"),
        ("--scenario", "cache"),
        ("--output", "/nowhere/coverage.json"),
    ],
)
def test_unknown_names_and_folders_are_refused(option, value):
    result = CliRunner().invoke(app, ["coverage", option, value])
    assert isinstance(result.exception, OptionValueError)
    assert value in str(result.exception)
