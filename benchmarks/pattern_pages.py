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
from mpass.patterns.base import Pattern, registered_patterns

FOLDER = Path(__file__).parent.parent / "docs" / "patterns"
MEASURED = "## Measured"
PICTURE_TOKENS = 8192


def page_of(cls: type[Pattern], kept: str) -> str:
    """The page of one pattern in Markdown; kept: what stands under "Measured", or nothing."""
    idea = inspect.getdoc(sys.modules[cls.__module__]) or ""
    meaning = inspect.getdoc(cls) or ""
    fields = [
        f"| `{field.name}` | {field.type} | `{field.default}` |"
        for field in dataclasses.fields(cls)
    ]
    cost = cls().cost()
    bound = inspect.getdoc(cls.cost) if cls.cost.__doc__ != Pattern.cost.__doc__ else ""
    kinds = {"lists": "key blocks per query block", "diagonals": "block diagonals per head"}
    parts = [
        f"# {cls.name}",
        idea,
        f"![{cls.name}: what it computes, and the exact attention]({cls.name}.svg)",
        f"With default parameters on a made-up prompt of {PICTURE_TOKENS} tokens: "
        f"`mpass draw {cls.name} --tokens {PICTURE_TOKENS} -o picture.svg`.",
        "## Parameters",
        meaning,
        "\n".join(["| field | type | default |", "|---|---|---|", *fields]) if fields else "",
        "## Cost",
        "Multiply-adds of one head, N tokens, D head_dim, with default parameters"
        + (f". {bound}" if bound else ".").replace("..", "."),
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
