"""Write docs/patterns/<name>.md for every registered pattern from its own docstrings and cost().

    python benchmarks/pattern_pages.py
    python benchmarks/pattern_pages.py --pictures    # docs/patterns/<name>.svg, too

What is under the heading "Measured" in a page is kept: that is written by hand.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from pathlib import Path

from mpass.inspection.draw import as_svg, draw_pattern
from mpass.patterns.base import Pattern, parameter_kinds, registered_patterns

FOLDER = Path(__file__).parent.parent / "docs" / "patterns"
MEASURED = "## Measured"
PICTURE_TOKENS = 8192


def split_docstring(cls: type[Pattern]) -> tuple[str, dict[str, str]]:
    """What a class says of itself, and the meaning of each parameter.

    A parameter's meaning begins on a line of its own, `name: Meaning.`; it ends before the next
    parameter, or at an empty line.
    """
    words: list[str] = []
    meanings: dict[str, str] = {}
    current = ""
    for line in (inspect.getdoc(cls) or "").splitlines():
        name, colon, rest = line.partition(": ")
        if colon and name in parameter_kinds(cls):
            current = name
            meanings[name] = rest.strip()
        elif current and line.strip():
            meanings[current] += f" {line.strip()}"
        else:
            current = ""
            words.append(line)
    return "\n".join(words).strip(), meanings


def parameter_table(cls: type[Pattern], meanings: dict[str, str]) -> str:
    """A row per parameter, in Markdown; "" for a pattern without parameters."""
    kinds = parameter_kinds(cls)
    rows = [
        f"| `{field.name}` | {kinds[field.name]} | `{field.default!r}` | "
        f"{meanings.get(field.name, '')} |"
        for field in dataclasses.fields(cls)
    ]
    head = ["| parameter | type | default | meaning |", "|---|---|---|---|"]
    return "\n".join([*head, *rows]) if rows else ""


def page_of(cls: type[Pattern], kept: str) -> str:
    """The page of one pattern in Markdown; kept: what stands under "Measured", or nothing."""
    idea = inspect.getdoc(sys.modules[cls.__module__]) or ""
    meaning, meanings = split_docstring(cls)
    cost = cls().cost()
    bound = (cls.cost.__doc__ or "").strip()
    kinds = {"lists": "key blocks per query block", "diagonals": "block diagonals per head"}
    parts = [
        f"# {cls.name}",
        idea,
        f"![{cls.name}: what it computes, and the exact attention]({cls.name}.svg)",
        f"With default parameters on a made-up prompt of {PICTURE_TOKENS} tokens: "
        f"`mpass draw {cls.name} --tokens {PICTURE_TOKENS} -o picture.svg`.",
        "## Parameters",
        meaning,
        parameter_table(cls, meanings),
        "## Cost",
        "Multiply-adds of one head, N tokens, D head_dim, with default parameters"
        + (f". {bound}" if bound else "."),
        f"    {cost}",
        "## Index",
        f"{kinds[cls.form].capitalize()}; "
        + ("also without a causal mask." if cls.bidirectional else "causal attention only."),
        kept,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def main(pictures: bool = False) -> None:
    """Write the pages, and the pictures if asked for: they take a minute."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, cls in sorted(registered_patterns().items()):
        path = FOLDER / f"{name}.md"
        old = path.read_text() if path.is_file() else ""
        kept = MEASURED + old.split(MEASURED, 1)[1].rstrip() if MEASURED in old else ""
        path.write_text(page_of(cls, kept))
        if pictures:
            picture = draw_pattern(cls(), num_tokens=PICTURE_TOKENS)
            path.with_suffix(".svg").write_text(as_svg([picture]))


if __name__ == "__main__":
    main(pictures="--pictures" in sys.argv[1:])
