"""Tables of benchmarks/calibration.py, from the lines of its stages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def report(
    figures: dict[str, Any],
    lines: list[dict[str, Any]],
    found: list[dict[str, Any]],
    texts: Sequence[str],
    output: Path,
) -> None:
    """Print the tables in Markdown; write everything into one JSON file.

    figures: of the search; lines: of quality; found: of needles.
    """
    rows = quality_rows(lines)
    print("| choice | pattern |" + "".join(f" {text} |" for text in texts))
    print("| --- | --- |" + " --- |" * len(texts))
    for name in sorted(rows, key=order_of):
        cells = "".join(cell(rows[name].get(text)) for text in texts)
        rival, _, budget = name.partition(" @ ")
        pattern = figures["rivals"].get(budget, {}).get(rival, "per head")
        print(f"| {name} | {pattern} |{cells}")
    print("\n| choice |" + "".join(f" {task}, {n} |" for n, task in needle_columns(found)))
    print("| --- |" + " --- |" * len(needle_columns(found)))
    for name in sorted({line["name"] for line in found}, key=order_of):
        cells = ""
        for length, task in needle_columns(found):
            scores = [
                line["score"]
                for line in found
                if (line["name"], line["length"], line["task"]) == (name, length, task)
            ]
            cells += f" {sum(scores):g} of {len(scores)} |"
        print(f"| {name} |{cells}")
    equal = equal_quality(rows, texts)
    for line in equal:
        print(f"\n{line}")
    whole = {"search": figures, "quality": lines, "needles": found, "equal_quality": equal}
    output.write_text(json.dumps(whole, indent=1) + "\n")


def cell(row: dict[str, float] | None) -> str:
    """Divergence, increase of the loss in brackets, and share of dense's attention time."""
    if row is None:
        return " |"
    return f" {row['divergence']:.4f} ({row['increase']:+.4f}) at {row['share']:.1%} |"


def quality_rows(lines: list[dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    """Per contestant and text: divergence from dense, loss over it, and attention time as a share.

    Divergence tells contestants apart best: where it is d, the increase of the loss over n tokens
    has a standard error of about sqrt(2 d / n).
    """
    dense = {line["text"]: line for line in lines if line["name"] == "dense"}
    rows: dict[str, dict[str, dict[str, float]]] = {}
    for line in lines:
        exact = dense[line["text"]]
        rows.setdefault(line["name"], {})[line["text"]] = {
            "increase": line["loss"] - exact["loss"],
            "divergence": line.get("divergence", 0.0),
            "share": line["seconds"] / exact["seconds"],
            "seconds": line["seconds"],
        }
    return rows


def order_of(name: str) -> tuple[str, bool, str]:
    """Contestants by budget, the searched one first."""
    rival, _, budget = name.partition(" @ ")
    return budget, rival != "searched", rival


def needle_columns(lines: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return sorted({(line["length"], line["task"]) for line in lines})


def equal_quality(
    rows: dict[str, dict[str, dict[str, float]]], texts: Sequence[str]
) -> list[dict[str, Any]]:
    """Per rival that ran on all texts: the fastest searched config that diverges no more than it.

    Divergences and seconds are means over the texts.
    """

    def mean(name: str, what: str) -> float:
        return sum(rows[name][text][what] for text in texts) / len(texts)

    complete = [name for name in rows if set(texts) <= set(rows[name]) and name != "dense"]
    searched = [name for name in complete if name.startswith("searched")]
    found = []
    for rival in (name for name in complete if name not in searched):
        as_good = [n for n in searched if mean(n, "divergence") <= mean(rival, "divergence")]
        if as_good:
            fastest = min(as_good, key=lambda name: mean(name, "seconds"))
            figures: dict[str, Any] = {"rival": rival, "searched": fastest}
            for who, name in (("rival", rival), ("searched", fastest)):
                for what in ("divergence", "increase", "seconds"):
                    figures[f"{who}_{what}"] = mean(name, what)
            found.append(figures)
    return found
