"""A newcomer's walk: the first steps from a wheel, in a Python without this repository.

    make walk
    make walk PYTHON=python3.12 ARGS="--torch torch==2.11.0 --tests"

It copies the files that git knows, builds the wheel as README says, deletes the copy, makes a
virtual environment, installs torch and then the wheel, and goes through docs/first_steps.md in an
empty folder. Output that is not what the page shows ends it with status 1, and so do a wheel of
1 MB and 60 MB or more beside torch. The environment is kept for the next walk, which then measures
no size. Only the standard library is used here.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

from tests.helpers.paths import ROOT
from tests.helpers.readme import Step, difference, first_steps

LARGEST_WHEEL = 1e6
"""Bytes of a wheel."""

LARGEST_ADDED = 60e6
"""Bytes that `pip install` of the wheel may add to an environment that has torch."""

TESTS = (
    *("tests/test_package.py", "tests/backend/test_backend.py", "tests/test_functional.py"),
    *("tests/backend/test_compile_in_place.py", "tests/config", "tests/graph"),
    *("tests/masks/test_prover.py", "tests/match/test_spellings.py", "tests/patterns"),
    "tests/lowering/cpu/test_attention.py",
)
"""What `--tests` runs in the same environment, over the sources of this repository."""

SPLIT = "\N{SYMBOL FOR UNIT SEPARATOR}\n"
"""What a program of several blocks prints between them."""

NOT_TAKEN = re.compile("PYTHON(?!UTF8).*|MPASS_.*|TORCH.*|VIRTUAL_ENV|OMP_NUM_THREADS")
"""Variables that a newcomer does not have."""


class Desk:
    """An empty folder beside a virtual environment, and what is typed there."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.desk = folder / "desk"
        self.bin = folder / "venv" / "bin"
        for part in ("desk", "home", "cache"):
            shutil.rmtree(folder / part, ignore_errors=True)
            (folder / part).mkdir(parents=True)
        kept = {name: value for name, value in os.environ.items() if not NOT_TAKEN.fullmatch(name)}
        self.variables = kept | {
            "PATH": f"{self.bin}{os.pathsep}{os.environ['PATH']}",
            "HOME": str(folder / "home"),
            "MPASS_CACHE": str(folder / "cache"),
            "TORCHINDUCTOR_CACHE_DIR": str(folder / "cache" / "inductor"),
            "COLUMNS": "100",
        }

    def run(self, *command: str, cwd: Path | None = None) -> str:
        """The output of a command; its failure ends the walk."""
        done = subprocess.run(
            command,
            cwd=cwd or self.desk,
            env=self.variables,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(f"{' '.join(command)}\n{done.stdout}\n{done.stderr}")
        return done.stdout

    def python(self, *arguments: str) -> str:
        return self.run(str(self.bin / "python"), *arguments)

    def installed(self) -> int:
        """Bytes of what is installed."""
        (packages,) = (self.folder / "venv").glob("lib/python3*/site-packages")
        return sum(path.stat().st_size for path in packages.rglob("*") if path.is_file())


def copy_of_the_repository(target: Path) -> None:
    """The files that git knows, as they are now."""
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (target / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, target / name)


def install(desk: Desk, steps: list[Step], torch: str) -> None:
    """pip's lines of README: the wheel is built in a clone, which is deleted before the rest."""
    say(f"Python {platform.python_version()}; {torch}")
    new = not (desk.bin / "python").exists()
    if new:
        subprocess.run([sys.executable, "-m", "venv", str(desk.folder / "venv")], check=True)
        desk.python("-m", "pip", "install", "--quiet", torch)
    desk.run("pip", "uninstall", "--quiet", "--yes", "mpass")
    clone = desk.folder / "clone"
    shutil.rmtree(clone, ignore_errors=True)
    copy_of_the_repository(clone)
    built, *others = (step.text for step in steps if step.text.startswith("pip "))
    shell = ("bash", "-c")
    desk.run(*shell, built, cwd=clone)
    shutil.copytree(clone / "dist", desk.desk / "dist")
    shutil.rmtree(clone)
    (wheel,) = (desk.desk / "dist").glob("mpass-*.whl")
    hold("the wheel", wheel.stat().st_size, LARGEST_WHEEL)
    before = desk.installed()
    desk.run("pip", "install", "--quiet", str(wheel))
    if new:
        hold("mpass and what it needs beside torch", desk.installed() - before, LARGEST_ADDED)
    for line in others:
        desk.run(*shell, line)
    names = "mpass.__file__, torch.__version__, transformers.__version__"
    asked = f"import mpass, torch, transformers; print({names})"
    place, *versions = desk.python("-c", asked).split()
    assert Path(place).is_relative_to(desk.folder / "venv"), place
    say("torch {}, transformers {}".format(*versions))


def say(line: str) -> None:
    print(line, flush=True)


def hold(what: str, size: float, below: float) -> None:
    """Tell a size, and end the walk if it is not below what is allowed."""
    say(f"{what}: {size / 1e6:.2f} MB, below {below / 1e6:g} MB")
    if size >= below:
        raise SystemExit(f"{what} is too large")


def program(steps: list[Step]) -> str:
    """All blocks of Python as one program, which tells its outputs apart."""
    blocks = [step.text for step in steps if step.kind == "run"]
    return f"\nprint({SPLIT.strip()!r}, flush=True)\n".join(blocks)


def walk(desk: Desk, steps: list[Step]) -> list[str]:
    """Go through the page; what differed, "" for a step that was as shown."""
    for step in steps:
        if step.kind == "save":
            (desk.desk / step.name).write_text(step.text, encoding="utf-8")
    (desk.desk / "first.py").write_text(program(steps), encoding="utf-8")
    printed = iter(desk.python("first.py").split(SPLIT))
    faults = []
    for step in steps:
        if step.kind == "run":
            faults.append(difference(step, next(printed)))
        elif step.kind == "call" and not step.text.startswith("pip "):
            faults.append(difference(step, desk.run("bash", "-c", step.text)))
    return faults


def run_tests(desk: Desk) -> int:
    """The exit status of `TESTS` in the walk's environment."""
    wheel = next((desk.desk / "dist").glob("mpass-*.whl"))
    desk.run("pip", "install", "--quiet", f"{wheel}[test]")
    command = [str(desk.bin / "python"), "-m", "pytest", "-q", "-n0", *TESTS]
    own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=desk.variables | own).returncode


def main() -> None:
    pinned = re.search("^torch==.*", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    parser = argparse.ArgumentParser(prog="make walk", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--torch", default=pinned[0] if pinned else "torch", help="as pip takes it")
    parser.add_argument("--folder", type=Path, default=ROOT / "build" / "walk")
    parser.add_argument("--tests", action="store_true", help="run tests in the same environment")
    arguments = parser.parse_args()
    began = time.monotonic()
    steps = first_steps()
    desk = Desk(arguments.folder.resolve())
    install(desk, steps, arguments.torch)
    faults = walk(desk, steps)
    for fault in filter(None, faults):
        say(fault)
    wrong = sum(map(bool, faults))
    say(f"{len(faults)} steps, {wrong} not as shown, {time.monotonic() - began:.0f} s")
    raise SystemExit(bool(wrong) or (arguments.tests and run_tests(desk)))


if __name__ == "__main__":
    main()
