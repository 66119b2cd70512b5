"""`mpass demo` and `mpass patterns` as commands: refusals in one line, help without torch."""

from __future__ import annotations

import sys

import pytest

import mpass
from mpass.cli.app import app, main
from mpass.errors import MpassError, OptionValueError
from tests.helpers.processes import run_python


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mpass", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pattern", "slash"],
        ["--length", "-1"],
        ["--model", "/no/such/model"],
        ["--text", "/no/such/text"],
        ["--output", "/no/such/folder/file.json"],
    ],
)
def test_the_command_refuses_bad_input_in_one_line(monkeypatch, capsys, arguments):
    code, printed = run_main(monkeypatch, capsys, "demo", *arguments)
    assert code == 2
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("mpass: ") and arguments[1] in last


def test_the_command_finds_the_refusal_inside_of_dynamos_error():
    from mpass.cli.app import user_error

    class Wrapper(Exception):
        inner_exception = OptionValueError("pattern", 1, "a name")

    assert isinstance(user_error(Wrapper()), MpassError)
    assert user_error(ValueError("a bug")) is None


def test_version_and_help_need_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from mpass.cli.app import app\n"
        "runner = CliRunner()\n"
        "print(runner.invoke(app, ['--version']).output)\n"
        "help = runner.invoke(app, ['demo', '--help'])\n"
        "assert help.exit_code == 0 and '--pattern' in help.output\n"
        "assert 'torch' not in sys.modules"
    )
    printed = run_python("-c", code)
    assert printed.stdout.strip() == f"mpass {mpass.__version__}"


def test_patterns_are_listed_with_their_parameters():
    from typer.testing import CliRunner

    listed = CliRunner().invoke(app, ["patterns"])
    assert listed.exit_code == 0
    assert "vertical_slash" in listed.output and "top_k" in listed.output
