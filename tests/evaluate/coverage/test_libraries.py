"""`mpass coverage --kind library`: programs of libraries, and what is told of absent ones."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from mpass.cli.app import app
from mpass.evaluate.classes import line, read_records
from mpass.evaluate.libraries import cover_libraries
from mpass.models.libraries import LIBRARIES, Library
from tests.helpers.paths import ROOT

BY_NAME = {library.name: library for library in LIBRARIES}


pytestmark = pytest.mark.usefixtures("fresh_dynamo", "plain_torch")


def test_modules_of_torch_are_sparse():
    records = list(cover_libraries([BY_NAME["torch"]]))
    assert [record.scenario for record in records] == list(BY_NAME["torch"].programs)
    for record in records:
        assert record.equal and record.sparse == record.sites == record.attentions, line(record)


def test_a_library_that_is_not_here_is_told_once():
    def absent():
        raise ModuleNotFoundError("No module named 'absent'")

    (record,) = cover_libraries([Library("absent", "absent", {"a": absent, "b": absent})])
    assert record.not_run == "ModuleNotFoundError: No module named 'absent'"


@pytest.mark.slow
@pytest.mark.parametrize(
    "library", [lib for lib in LIBRARIES if lib.name != "torch"], ids=lambda lib: lib.name
)
def test_programs_of_installed_libraries_equal_eager(library):
    pytest.importorskip(library.module, reason="benchmarks/libraries.txt is not installed")
    for record in cover_libraries([library]):
        assert record.equal, line(record)
        assert record.sites >= record.attentions, line(record)


def test_ten_libraries_have_their_versions_pinned():
    text = (ROOT / "benchmarks" / "libraries.txt").read_text(encoding="utf-8")
    pinned = {row.partition("==")[0] for row in text.splitlines() if "==" in row}
    assert len(BY_NAME) == 10 and set(BY_NAME) - pinned == {"torch"}


def test_libraries_are_run_by_the_command(tmp_path):
    output = tmp_path / "libraries.jsonl"
    options = ["--kind", "library", "--model-type", "fair-esm", "--output", str(output)]
    result = CliRunner().invoke(app, ["coverage", *options])
    assert result.exit_code == 0, result.output
    assert {record.name for record in read_records(output)} == {"library:fair-esm"}
