"""The signals of benchmarks.quality.signals beside the losses, a line per text and setting.

    python -m benchmarks.quality.signals_table FILE [--out SHORT]

lost: softmax mass on keys that were not computed; error: squared error of an attention's output
over its square; both are means over layers. The last columns are the divergence for each: the
signal that predicts best is the one whose quotient varies least. SHORT gets the lines without what
is said of single heads.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def mean(values: list[float]) -> float:
    return sum(values) / max(1, len(values))


def shorten(line: dict[str, Any]) -> dict[str, Any]:
    """A line with the means over its layers in the place of the layers."""
    layers = list(line["layers"].values())
    short = {name: value for name, value in line.items() if name != "layers"}
    over: dict[str, Callable[[dict[str, list[float]]], float]] = {
        "lost_mass": lambda layer: mean(layer["lost"]),
        "relative_error": lambda layer: sum(layer["error"]) / sum(layer["norm"]),
        "value_lost": lambda layer: mean(layer["value_lost"]),
    }
    for name, of_layer in over.items():
        short[name] = mean([of_layer(layer) for layer in layers])
    return {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in short.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [json.loads(line) for line in arguments.file.read_text("utf-8").splitlines()]
    if any("layers" in line for line in lines):
        lines = [shorten(line) for line in lines if line["setting"] != "dense"]
    if arguments.out is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        arguments.out.write_text(text, "utf-8")
    print(
        "| text | setting | density | loss | last quarter | divergence | lost | error | d/l | d/e |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        divergence = line["divergence"]
        print(
            f"| {line['text']} | `{line['setting']}` | {line['density']:.1%} "
            f"| {line['loss']:+.4f} ±{line['error']:.4f} "
            f"| {line['last']:+.4f} ±{line['last_error']:.4f} | {divergence:.4f} "
            f"| {line['lost_mass']:.2%} | {line['relative_error']:.2%} "
            f"| {divergence / line['lost_mass']:.2f} | {divergence / line['relative_error']:.1f} |"
        )


if __name__ == "__main__":
    main()
