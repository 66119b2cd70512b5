"""The signals of benchmarks.quality.signals beside the losses, a line per text and setting.

    python -m benchmarks.quality.signals_table FILES [--out SHORT] [--plots FOLDER]

lost: softmax mass on keys that were not computed; error: squared error of an attention's output
over its square; both are means over layers. The last columns are the divergence for each: the
signal that predicts best is the one whose quotient varies least. Below the table stands by what
factor the quotient of each signal varies: over all lines, from text to text at one setting, and
within a text from setting to setting. Then each line's divergence is predicted by its signal and
what the other texts say of the signal: the share of lines that are within a factor of two is
printed, and FOLDER gets a picture per signal. SHORT gets the lines without what is said of single
heads.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mpass.evaluate.charts import Axis, draw_scatter

SIGNALS = ("lost_mass", "relative_error", "value_lost")


def wanted(line: dict[str, Any]) -> bool:
    """Whether a line is one of a sparse prefill."""
    return bool(line["setting"] != "dense")


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


def factor(logarithms: list[float]) -> float:
    """One standard deviation of what these are the logarithms of, as a factor."""
    return math.exp(statistics.pstdev(logarithms)) if len(logarithms) > 1 else 1.0


def spreads(lines: list[dict[str, Any]]) -> Iterator[tuple[str, float, float, float]]:
    """By what factor divergence over each signal varies: over all, over texts, over settings."""
    for signal in SIGNALS:
        quotients: dict[tuple[str, int], list[float]] = {}
        for line in lines:
            value = math.log(line["divergence"] / line[signal])
            quotients.setdefault((line["text"], line["length"]), []).append(value)
        everything = [value for values in quotients.values() for value in values]
        means = [mean(values) for values in quotients.values()]
        inside = [
            value - mean(values)
            for values in quotients.values()
            if len(values) > 1
            for value in values
        ]
        yield signal, factor(everything), factor(means), factor(inside)


def predictions(lines: list[dict[str, Any]], signal: str) -> list[float]:
    """The divergence of each line by its signal and the mean quotient on other texts."""
    found = []
    for line in lines:
        others = [
            math.log(other["divergence"] / other[signal])
            for other in lines
            if other["text"] != line["text"]
        ]
        found.append(line[signal] * math.exp(mean(others)))
    return found


def draw(lines: list[dict[str, Any]], signal: str, predicted: list[float]) -> str:
    """Measured against predicted divergence, a point per line and a hue per text, as SVG."""
    most = 1.05 * max(*predicted, *(line["divergence"] for line in lines))
    series: dict[str, list[tuple[float, float, str]]] = {}
    for line, x in zip(lines, predicted, strict=True):
        words = f"{line['text']}, {line['length']} tokens, {line['setting']}"
        series.setdefault(line["text"], []).append((x, line["divergence"], words))
    axes = [
        Axis(f"{name} divergence, nats", 0.0, most, root=True) for name in ("predicted", "real")
    ]
    return draw_scatter(f"predicted by {signal.replace('_', ' ')}", series, *axes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plots", type=Path)
    arguments = parser.parse_args()
    read = [line for file in arguments.files for line in file.read_text("utf-8").splitlines()]
    lines = [json.loads(line) for line in read]
    lines = [line if "lost_mass" in line else shorten(line) for line in lines if wanted(line)]
    lines.sort(key=lambda line: (line["length"], line["text"]))
    if arguments.out is not None:
        text = "".join(json.dumps(line) + "\n" for line in lines)
        arguments.out.write_text(text, "utf-8")
    print(
        "| tokens | text | setting | density | loss | last quarter | divergence | lost | error "
        "| d/l | d/e |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for line in lines:
        divergence = line["divergence"]
        print(
            f"| {line['length']} | {line['text']} | `{line['setting']}` | {line['density']:.1%} "
            f"| {line['loss']:+.4f} ±{line['error']:.4f} "
            f"| {line['last']:+.4f} ±{line['last_error']:.4f} | {divergence:.4f} "
            f"| {line['lost_mass']:.2%} | {line['relative_error']:.2%} "
            f"| {divergence / line['lost_mass']:.2f} | {divergence / line['relative_error']:.1f} |"
        )
    print("\n| signal | varies in all | from text to text | within a text |\n|---|---|---|---|")
    for signal, *factors in spreads(lines):
        print(f"| {signal} | " + " | ".join(f"{value:.2f}" for value in factors) + " |")
    for signal in SIGNALS:
        predicted = predictions(lines, signal)
        within = [
            0.5 <= line["divergence"] / value <= 2.0
            for line, value in zip(lines, predicted, strict=True)
        ]
        print(f"{signal}: {mean(list(map(float, within))):.0%} of the lines within a factor of two")
        if arguments.plots is not None:
            place = arguments.plots / f"quality_prediction_{signal}.svg"
            place.write_text(draw(lines, signal, predicted), "utf-8")


if __name__ == "__main__":
    main()
