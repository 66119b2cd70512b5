"""What dividing a loss among layers by their sensitivity could gain, from lines of quality.layers.

    python -m benchmarks.quality.layers_table benchmarks/results/quality_layers.jsonl

The divergence of a group of layers at a promise is taken to be what was measured at the greatest
one, times a signal (lost mass, or squared error of the output) over the signal's there. `same` is
the density where every layer keeps the same promise; `own` where each group has the promise by
which the sum of the predicted divergences is the same and the density least, known of this very
text; `others` where the promises are those that are best on the other texts.
"""

from __future__ import annotations

import argparse
import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

from benchmarks.quality.layers import PROMISES

SIGNALS = ("lost", "error")
STEPS = 8
"""Promises that are tried between two that were measured."""

Curve = list[tuple[float, float]]
"""Density and predicted divergence of a group of layers at each promise that is tried."""


def between(values: list[float], *, power: bool) -> list[float]:
    """Values at PROMISES with STEPS steps between them, in even parts or in even factors."""
    found = []
    for low, high in pairwise(values):
        for i in range(STEPS):
            part = i / STEPS
            even = low + part * (high - low)
            found.append(low * (high / low) ** part if power and low > 0 < high else even)
    return [*found, values[-1]]


def curves_of(lines: list[dict[str, Any]], signal: str) -> list[Curve]:
    """What each group of layers of a text computes and is predicted to lose."""
    found = []
    for line in lines:
        count = len(line["curves"])
        mean = [
            [sum(curve[name][i] for curve in line["curves"]) / count for i in range(len(PROMISES))]
            for name in ("density", signal)
        ]
        density, values = between(mean[0], power=False), between(mean[1], power=True)
        slope = line["divergence"] / values[-1]
        found.append([(d, slope * v) for d, v in zip(density, values, strict=True)])
    return found


def totals(curves: list[Curve], chosen: list[int]) -> tuple[float, float]:
    """Mean density and summed divergence of what was chosen for each group."""
    pairs = [curve[i] for curve, i in zip(curves, chosen, strict=True)]
    return sum(d for d, _ in pairs) / len(pairs), sum(k for _, k in pairs)


def divide(curves: list[Curve], most: float) -> list[int]:
    """The promises by which the divergence is at most `most` and the density least."""

    def best(price: float) -> list[int]:
        return [min(range(len(c)), key=lambda i: c[i][0] + price * c[i][1]) for c in curves]

    low, high = 1e-6, 1e6
    for _ in range(80):
        price = math.sqrt(low * high)
        low, high = (low, price) if totals(curves, best(price))[1] <= most else (price, high)
    return best(high)


def moved(chosen: list[int], by: int, size: int) -> list[int]:
    """Promises that are all greater, or smaller, by so many steps."""
    return [min(size - 1, max(0, i + by)) for i in chosen]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    arguments = parser.parse_args()
    lines = [json.loads(row) for file in arguments.files for row in file.read_text().splitlines()]
    texts: dict[tuple[str, str, int], list[dict[str, Any]]] = {}
    for line in lines:
        texts.setdefault((line["model"], line["text"], line["length"]), []).append(line)
    grid = between(list(PROMISES), power=True)
    print("| text | signal | promise | same | own | others |\n|---|---|---|---|---|---|")
    for signal in SIGNALS:
        known = {key: curves_of(found, signal) for key, found in texts.items()}
        for promise in (0.003, 0.01, 0.03):
            start = min(range(len(grid)), key=lambda i: abs(math.log(grid[i] / promise)))
            chosen = {}
            for key, curves in known.items():
                _, most = totals(curves, [start] * len(curves))
                chosen[key] = divide(curves, most)
            for key, curves in known.items():
                same, most = totals(curves, [start] * len(curves))
                own, _ = totals(curves, chosen[key])
                rest = [c for k, c in chosen.items() if k != key and k[0] == key[0]]
                words = f"| {key[1]}, {key[2]} | {signal} | {promise} | {same:.1%} | {own:.1%} |"
                if not rest:
                    print(words, "|")
                    continue
                mean = [round(sum(column) / len(column)) for column in zip(*rest, strict=True)]
                tries = (totals(curves, moved(mean, by, len(grid))) for by in range(-64, 65))
                others = min(density for density, divergence in tries if divergence <= most)
                print(words, f"{others:.1%} |")


if __name__ == "__main__":
    main()
