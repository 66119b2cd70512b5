"""`mpass env` tells what a bug report needs."""

from __future__ import annotations

import json
import subprocess
import sys

import torch
from typer.testing import CliRunner

from mpass import __version__
from mpass.cli.app import app


def test_env_names_versions_processor_and_cache():
    shown = CliRunner().invoke(app, ["env"]).output
    for words in (__version__, torch.__version__, "instruction sets", "lowering cpu", "cache"):
        assert words in shown


def test_env_as_json_has_the_same_values(monkeypatch):
    monkeypatch.setenv("MPASS_CACHE", "/somewhere/else")
    found = json.loads(CliRunner().invoke(app, ["env", "--json"]).output)
    assert found["MPASS_CACHE"] == "/somewhere/else"
    assert found["cache"].startswith("/somewhere/else (0 files")
    assert found["torch"] == torch.__version__


def test_the_command_line_runs_as_a_module_and_short_help_works():
    done = subprocess.run(
        [sys.executable, "-m", "mpass", "env", "-h"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0
    assert "bug report" in done.stdout
