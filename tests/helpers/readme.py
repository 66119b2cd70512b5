"""README's installation and docs/first_steps.md: what a newcomer types and what is shown for it.

A block of Python whose first line is a comment with a file's name is that file. The others are one
program, block after block. Lines of a console begin with "$ "; what stands below them is output.
"""

from __future__ import annotations

import doctest
import re
from dataclasses import dataclass
from typing import Literal

from tests.helpers.paths import ROOT

SECTION = re.compile(r"^## Use it\n(.*?)^## ", re.MULTILINE | re.DOTALL)
BLOCK = re.compile(r"^```(python|console|text)\n(.*?)^```", re.MULTILINE | re.DOTALL)
FILE = re.compile(r"# (\w+\.py)\n(.*)", re.DOTALL)


@dataclass(frozen=True)
class Step:
    """What is typed or saved, and what is shown to be printed.

    kind: "run" is Python, "save" a file called `name`, "call" one line of a shell. shown: None
    where the page shows no output.
    """

    kind: Literal["run", "save", "call"]
    text: str
    name: str = ""
    shown: str | None = None


def page(name: str) -> str:
    """The text of a page."""
    return (ROOT / name).read_text(encoding="utf-8")


def program_of_readme() -> str:
    """README's ten lines, for a reader's own model and prompt."""
    (section,) = SECTION.findall(page("README.md"))
    (program,) = [text for kind, text in BLOCK.findall(section) if kind == "python"]
    return program


def first_steps() -> list[Step]:
    """The steps in their order: README's lines of a console, and then all of the page."""
    (section,) = SECTION.findall(page("README.md"))
    typed = [block for block in BLOCK.findall(section) if block[0] == "console"]
    steps: list[Step] = []
    for kind, text in [*typed, *BLOCK.findall(page("docs/first_steps.md"))]:
        file = FILE.fullmatch(text)
        if kind == "text":
            last = steps.pop()
            steps.append(Step(last.kind, last.text, last.name, text))
        elif kind == "console":
            steps += calls(text)
        elif file:
            steps.append(Step("save", file[2], file[1]))
        else:
            steps.append(Step("run", text))
    return steps


def calls(text: str) -> list[Step]:
    """The lines of a console, each with the output below it; pip's has none worth showing."""
    found = []
    for part in re.split(r"^\$ ", text, flags=re.MULTILINE)[1:]:
        line, _, shown = part.partition("\n")
        found.append(Step("call", line, shown=shown or None))
    return found


def difference(step: Step, printed: str) -> str:
    """How the output differs from what is shown, "" if it does not; `...` stands for anything."""
    wanted = "".join(f"{line.rstrip()}\n" for line in (step.shown or "").splitlines())
    printed = "".join(f"{line.rstrip()}\n" for line in printed.splitlines())
    checker = doctest.OutputChecker()
    if step.shown is None or checker.check_output(wanted, printed, doctest.ELLIPSIS):
        return ""
    example = doctest.Example(step.text, wanted)
    return f"{step.text}\n{checker.output_difference(example, printed, doctest.REPORT_NDIFF)}"
