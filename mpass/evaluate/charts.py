"""The evaluation's figures as pictures: SVG, without a plotting library.

One colour that fits light and dark pages; series differ by hue, values of a heat map by opacity.
"""

from __future__ import annotations

import math
import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from mpass.evaluate.plan import DENSE, GRID, PERPLEXITY
from mpass.evaluate.summary import LARGEST_LOSS, Summary
from mpass.files import write_whole

TEXT = "#7a7a7a"
COLOR = "#2f6fb5"
HUES = """#2f6fb5 #d9822b #3a9a5c #c23b4b #8a63b8 #8c6d4f #d46fae #5f6b73 #a8a02c #2fa5b5 #e0574f
    #4b4fc4""".split()
WIDTH, HEIGHT = 560, 360
LEFT, RIGHT, TOP, BOTTOM = 64, 170, 28, 44
CELL = 46

Point = tuple[float, float, str]
"""x, y, and the words that a pointer over it shows."""


@dataclass(frozen=True)
class Axis:
    """A scale between two values. root: places go by the square root, which opens small values."""

    name: str
    low: float
    high: float
    root: bool = False

    def place(self, value: float) -> float:
        """0 at `low` to 1 at `high`; what lies outside is put on the edge."""
        share = (value - self.low) / (self.high - self.low)
        share = min(1.0, max(0.0, share))
        return math.sqrt(share) if self.root else share

    def ticks(self) -> list[float]:
        """About five round values."""
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        for factor in (1, 2, 5, 10):
            if (self.high - self.low) / (step * factor) <= 6:
                break
        step *= factor
        first = math.ceil(self.low / step)
        return [i * step for i in range(first, math.floor(self.high / step) + 1)]


def draw_scatter(
    title: str, series: Mapping[str, Sequence[Point]], x: Axis, y: Axis, level: float | None = None
) -> str:
    """Points of several series, joined in the order of x; level: a dashed line at that y."""

    def at(horizontal: float, vertical: float) -> tuple[float, float]:
        across, up = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
        return LEFT + x.place(horizontal) * across, HEIGHT - BOTTOM - y.place(vertical) * up

    left, bottom = at(x.low, y.low)
    right, top = at(x.high, y.high)
    parts = [
        text(LEFT, 16, title, weight="bold"),
        f'<path d="M{left:g} {top:g}V{bottom:g}H{right:g}" fill="none" stroke="{TEXT}"/>',
        text((left + right) / 2, HEIGHT - 8, x.name, anchor="middle"),
        f'<g transform="translate(14 {(top + bottom) / 2:g}) rotate(-90)">'
        f"{text(0, 0, y.name, anchor='middle')}</g>",
    ]
    for value in x.ticks():
        parts.append(text(at(value, y.low)[0], bottom + 16, f"{value:g}", anchor="middle"))
    for value in y.ticks():
        parts.append(text(left - 6, at(x.low, value)[1] + 4, f"{value:g}", anchor="end"))
    if level is not None:
        height = at(x.low, level)[1]
        parts.append(
            f'<path d="M{left:g} {height:g}H{right:g}" stroke="{TEXT}" stroke-dasharray="4 4"/>'
        )
    for i, (name, points) in enumerate(series.items()):
        hue = HUES[i % len(HUES)]
        places = [(*at(*point[:2]), point[2]) for point in sorted(points)]
        line = "L".join(f"{px:.1f} {py:.1f}" for px, py, _ in places)
        parts.append(f'<path d="M{line}" fill="none" stroke="{hue}" stroke-opacity=".6"/>')
        parts += [
            f'<circle cx="{px:.1f}" cy="{py:.1f}" r="3.5" fill="{hue}">'
            f"<title>{escape(words)}</title></circle>"
            for px, py, words in places
        ]
        row = TOP + 6 + 17 * i
        parts.append(f'<circle cx="{WIDTH - RIGHT + 16}" cy="{row}" r="4" fill="{hue}"/>')
        parts.append(text(WIDTH - RIGHT + 26, row + 4, name))
    return svg(WIDTH, HEIGHT, parts)


def draw_heat(
    titles: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Mapping[tuple[str, str], float]],
) -> str:
    """Maps side by side, one per title: a cell per row and column, 0 empty to 1 full.

    A cell without a value shows a dash.
    """
    left = 16 + 7 * max(map(len, rows))
    across = max(len(columns) * CELL, 8 * max(map(len, titles))) + 24
    top = 34 + 6 * max(map(len, columns))
    parts = []
    for i, (title, cells) in enumerate(zip(titles, values, strict=True)):
        start = left + i * across
        parts.append(text(start, 16, title, weight="bold"))
        for j, column in enumerate(columns):
            x = start + j * CELL + CELL / 2
            parts.append(
                f'<g transform="translate({x:g} {top - 6}) rotate(-60)">{text(0, 4, column)}</g>'
            )
        for k, row in enumerate(rows):
            y = top + k * CELL / 2
            if i == 0:
                parts.append(text(left - 8, y + 15, row, anchor="end"))
            for j, column in enumerate(columns):
                parts.append(heat_cell(start + j * CELL, y, cells.get((row, column))))
    width = left + len(titles) * across
    return svg(width, round(top + len(rows) * CELL / 2 + 10), parts)


def heat_cell(x: float, y: float, value: float | None) -> str:
    """A rectangle whose opacity is the value, with the value in per cent."""
    opacity = 0.0 if value is None else 0.9 * min(1.0, max(0.0, value))
    words = "-" if value is None else f"{value:.0%}"
    color = "#ffffff" if opacity > 0.5 else TEXT
    return (
        f'<rect x="{x:g}" y="{y:g}" width="{CELL - 2}" height="{CELL / 2 - 2:g}" fill="{COLOR}" '
        f'fill-opacity="{opacity:.2f}" stroke="{COLOR}" stroke-opacity=".3"/>'
        f"{text(x + CELL / 2 - 1, y + 15, words, anchor='middle', color=color)}"
    )


def text(
    x: float,
    y: float,
    words: str,
    *,
    anchor: str = "start",
    weight: str = "normal",
    color: str = TEXT,
) -> str:
    """A line of text whose baseline starts (or is centred, or ends) at a point."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" font-weight="{weight}" '
        f'fill="{color}">{escape(words)}</text>'
    )


def svg(width: float, height: float, parts: Iterable[str]) -> str:
    """A whole picture."""
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
            f'width="{width:g}" font-family="system-ui, sans-serif" font-size="12">',
            *parts,
            "</svg>",
            "",
        ]
    )


def density_against_loss(title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """Density against the increase of the loss, as `loss_against` draws it."""
    return loss_against("density", title, series)


def loss_against(across: str, title: str, series: Mapping[str, Sequence[Point]]) -> str:
    """A share against the increase of the loss; the dashed line is what a default may cost.

    across: what the share is of, in words. An increase below 0 or above 0.3, and a share above 1,
    are drawn on the edge.
    """
    widest = max((point[0] for points in series.values() for point in points), default=1.0)
    share = Axis(across, 0.0, min(1.0, math.ceil(5 * widest) / 5))
    highest = max((point[1] for points in series.values() for point in points), default=0.0)
    high = max(2 * LARGEST_LOSS, min(0.3, highest))
    loss = Axis("nats per token over dense", 0.0, high, root=True)
    return draw_scatter(title, series, share, loss, LARGEST_LOSS)


def loss_by_position(lines: Iterable[Mapping[str, Any]]) -> str:
    """Increase of the loss by place in the window, mean over texts and windows of a length."""
    found: dict[str, list[list[float]]] = defaultdict(list)
    for line in lines:
        if line["task"] == PERPLEXITY and line["pattern"] != DENSE:
            pairs = zip(line["sparse_positions"], line["dense_positions"], strict=True)
            found[f"{line['pattern']}, {line['length']}"].append([a - b for a, b in pairs])
    series: dict[str, list[Point]] = {}
    for name, rows in found.items():
        means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
        series[name] = [
            ((i + 0.5) / len(means), mean, f"{name}: {mean:+.4f}") for i, mean in enumerate(means)
        ]
    values = [point[1] for points in series.values() for point in points]
    loss = Axis("nats per token over dense", min(0.0, *values), max(2 * LARGEST_LOSS, *values))
    place = Axis("place in the window", 0.0, 1.0)
    return draw_scatter("loss by position", series, place, loss, LARGEST_LOSS)


def needle_grid(lines: Iterable[Mapping[str, Any]]) -> str:
    """Strict score by depth and length, a map per pattern, dense first."""
    cells: dict[str, dict[tuple[str, str], list[float]]] = defaultdict(lambda: defaultdict(list))
    lengths, depths = set(), set()
    for line in lines:
        if line["task"] == GRID:
            cell = (f"depth {line['depth']:.0%}", str(line["length"]))
            cells[line["pattern"]][cell].append(line["score"])
            lengths.add(line["length"])
            depths.add(line["depth"])
    names = sorted(cells, key=lambda name: (name != DENSE, name))
    means = [{key: statistics.fmean(found) for key, found in cells[n].items()} for n in names]
    rows = [f"depth {depth:.0%}" for depth in sorted(depths)]
    return draw_heat(names, rows, [str(length) for length in sorted(lengths)], means)


def retention(summaries: Iterable[Summary]) -> str:
    """Strict score as a share of dense, a row per counted task and length, a column per pattern."""
    values = {
        (f"{item.task}, {item.length}", item.pattern): item.score / item.dense
        for item in summaries
        if item.last_quarter is None and item.counted
    }
    rows = list(dict.fromkeys(row for row, _ in values))
    columns = list(dict.fromkeys(column for _, column in values))
    return draw_heat(["strict score, share of dense"], rows, columns, [values])


def write_plots(
    folder: Path, lines: Sequence[Mapping[str, Any]], summaries: Sequence[Summary]
) -> list[Path]:
    """Write the pictures there is something to show in; returns their files."""
    pictures = {}
    losses = [item for item in summaries if item.last_quarter is not None]
    if losses:
        series: dict[str, list[Point]] = defaultdict(list)
        for item in losses:
            words = f"{item.pattern}: {item.density:.1%}, {item.score:+.4f}"
            series[f"{item.text}, {item.length}"].append((item.density, item.score, words))
        pictures["density_loss.svg"] = density_against_loss("density against loss", series)
    if any(line["task"] == PERPLEXITY and line["pattern"] != DENSE for line in lines):
        pictures["loss_by_position.svg"] = loss_by_position(lines)
    if any(line["task"] == GRID for line in lines):
        pictures["needle_grid.svg"] = needle_grid(lines)
    if any(item.last_quarter is None and item.counted for item in summaries):
        pictures["retention.svg"] = retention(summaries)
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        write_whole(folder / name, picture)
    return [folder / name for name in pictures]
