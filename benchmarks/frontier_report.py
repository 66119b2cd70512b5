"""Tables and pictures of benchmarks/frontier.py, from its lines."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpass.evaluate.charts import Point, loss_against
from mpass.evaluate.plan import DENSE
from mpass.evaluate.summary import LARGEST_LOSS

DENSITIES = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5)
"""At which patterns are compared."""

Line = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """A pattern with its parameters over all texts of a model and length.

    texts: how many; density, mean_loss: means over the texts; cost: seconds of estimation and
    attention as a share of dense attention's on the same texts; estimation_share: of these seconds;
    loss, last_quarter: increase over dense of the worst text, nats per token; error: the standard
    error of `loss`, from the differences at single positions.
    """

    pattern: str
    texts: int
    density: float
    estimation_share: float
    cost: float
    mean_loss: float
    loss: float
    error: float
    last_quarter: float

    @property
    def name(self) -> str:
        """The pattern without its parameters."""
        return self.pattern.split("(")[0]

    @property
    def gate(self) -> bool:
        """Whether it passes the loss gate of a default."""
        return max(self.loss, self.last_quarter) <= LARGEST_LOSS


def settings_of(lines: Iterable[Line]) -> list[Setting]:
    """The settings in the lines of one model and length, the cheapest first."""
    lines = list(lines)
    dense = {line["text"]: line["attention_seconds"] for line in lines if line["pattern"] == DENSE}
    groups: dict[str, list[Line]] = {}
    for line in lines:
        if line["pattern"] != DENSE:
            groups.setdefault(line["pattern"], []).append(line)
    found = []
    for pattern, group in groups.items():
        seconds = sum(line["index_seconds"] + line["attention_seconds"] for line in group)
        worst = max(group, key=increase)
        found.append(
            Setting(
                pattern=pattern,
                texts=len(group),
                density=statistics.fmean(line["density"] for line in group),
                estimation_share=statistics.fmean(line["estimation_share"] for line in group),
                cost=seconds / sum(dense[line["text"]] for line in group),
                mean_loss=statistics.fmean(map(increase, group)),
                loss=increase(worst),
                error=worst["error"],
                last_quarter=max(
                    line["sparse_quarters"][-1] - line["dense_quarters"][-1] for line in group
                ),
            )
        )
    return sorted(found, key=lambda setting: setting.cost)


def increase(line: Line) -> float:
    """Nats per token over dense."""
    return float(line["sparse"] - line["dense"])


def table_of_settings(settings: Iterable[Setting]) -> str:
    """A row per setting, the cheapest first; in Markdown."""
    header = ("pattern", "texts", "density", "cost", "index", "loss", "last quarter", "gate")
    rows = [
        (
            f"`{item.pattern}`",
            str(item.texts),
            f"{item.density:.1%}",
            f"{item.cost:.1%}",
            f"{item.estimation_share:.0%}",
            f"{item.loss:+.4f} ±{item.error:.4f}",
            f"{item.last_quarter:+.4f}",
            "passes" if item.gate else "",
        )
        for item in settings
    ]
    return markdown([header, *rows])


def table_at_densities(settings: Sequence[Setting]) -> str:
    """Mean loss of each pattern at the same densities, the least at 20% first; in Markdown.

    Between two settings it is interpolated; where a pattern has no settings the cell is empty.
    """
    curves = curves_of(settings)
    rows = []
    for name, curve in curves.items():
        values = [interpolate(curve, density) for density in DENSITIES]
        cells = ["" if value is None else f"{value:+.4f}" for value in values]
        middle = values[DENSITIES.index(0.2)]
        rows.append((float("inf") if middle is None else middle, (name, *cells)))
    header = ("loss at density", *(f"{density:.0%}" for density in DENSITIES))
    return markdown([header, *(cells for _, cells in sorted(rows))])


def curves_of(settings: Iterable[Setting]) -> dict[str, list[tuple[float, float]]]:
    """(density, mean loss) of the settings of each pattern that lose less than all sparser ones."""
    points: dict[str, list[tuple[float, float]]] = {}
    for item in settings:
        points.setdefault(item.name, []).append((item.density, item.mean_loss))
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, found in sorted(points.items()):
        curves[name] = []
        for density, loss in sorted(found):
            if not curves[name] or loss < curves[name][-1][1]:
                curves[name].append((density, loss))
    return curves


def interpolate(curve: Sequence[tuple[float, float]], place: float) -> float | None:
    """The loss between two points of a curve in ascending order; None outside of it."""
    for (left, low), (right, high) in itertools.pairwise(curve):
        if left <= place <= right:
            return low + (high - low) * (place - left) / (right - left)
    return None


def markdown(rows: Sequence[Sequence[str]]) -> str:
    """A table, its first row the header."""
    first, *others = rows
    return "\n".join(f"| {' | '.join(row)} |" for row in (first, ["---"] * len(first), *others))


def draw(settings: Iterable[Setting], title: str, *, by_cost: bool) -> str:
    """Density or cost against the loss of the worst text, a line per pattern."""
    series: dict[str, list[Point]] = {}
    for item in settings:
        words = f"{item.pattern}: {item.density:.1%}, {item.loss:+.4f}, cost {item.cost:.1%}"
        place = item.cost if by_cost else item.density
        series.setdefault(item.name, []).append((place, item.loss, words))
    across = "seconds, share of dense attention" if by_cost else "density"
    return loss_against(across, title, dict(sorted(series.items())))


def show(lines: Sequence[Line], target: Path) -> None:
    """Print the tables of each model and length; draw them into `target`_MODEL_LENGTH_*.svg."""
    for model, length in sorted({(line["model"], line["length"]) for line in lines}):
        group = [line for line in lines if (line["model"], line["length"]) == (model, length)]
        settings = settings_of(group)
        title = f"{model}, {length} tokens"
        print(f"\n{title}\n\n{table_of_settings(settings)}\n\n{table_at_densities(settings)}")
        for name, by_cost in (("density", False), ("cost", True)):
            picture = draw(settings, f"{title}: worst text", by_cost=by_cost)
            file = target.with_name(f"{target.name}_{model}_{length}_{name}.svg")
            file.write_text(picture, "utf-8")
