"""Predicted times of attention on GPUs beside measured ones: the tables of docs/gpu.md.

    python -m benchmarks.gpu.table                  # prints the tables of h200 and h100
    python -m benchmarks.gpu.table --chips b200     # of other chips
    python -m benchmarks.gpu.table --write          # puts them into docs/gpu.md
    python -m benchmarks.gpu.table --ratios         # how far the cost model is from the clock

Measured figures are the rows of benchmarks/results/gpu_*.json, which `python -m benchmarks.gpu` and
`python -m benchmarks.gpu.first` write; of several files of one device the later name counts. What
no file holds says so. Needs no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.inputs import Shape
from mpass.lowering.crossover import LayerWork
from mpass.lowering.triton.chips import CHIPS, Chip
from mpass.lowering.triton.cost_model import Prediction, predict
from mpass.lowering.triton.decisions import least_lengths
from mpass.patterns.base import find_pattern
from mpass.patterns.base.work import layer_work

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
PAGE = ROOT / "docs" / "gpu.md"
BEGIN, END = "<!-- python -m benchmarks.gpu.table --write -->", "<!-- end of the tables -->"

LENGTHS = {8192: "8K", 32768: "32K", 131072: "128K", 1048576: "1M"}
SHORT = (128, 512, 1024, 2048, 4096, 8192, 16384, 32768)
"""Lengths at which what the guards choose is shown beside dense attention."""

LAYERS = {"union": "union", "vertical_slash": "vertical slash", "block_max": "block max"}
"""Patterns that are shown, and their names in the benchmark's rows."""

DENSITIES = (0.01, 0.05, 0.2, 1.0)
NOTHING = "not measured"

Rows = dict[str, dict[str, Any]]


@dataclasses.dataclass(frozen=True)
class Measured:
    """The rows of one chip's results; about: device and versions, in words, "" without results."""

    rows: Rows
    about: str

    def figure(self, name: str, key: str = "ms") -> float | None:
        """A figure of a row, None where it was not measured."""
        value = self.rows.get(name, {}).get(key)
        return None if value is None else float(value)


def load_results(chip: Chip, folder: Path = RESULTS) -> Measured:
    """What was measured on a chip."""
    rows: Rows = {}
    about = ""
    for path in sorted(folder.glob("gpu_*.json")):
        content = json.loads(path.read_text())
        device = content.get("about", {}).get("device", "")
        if not any(mark in device for mark in chip.marks) or content["about"].get("smoke"):
            continue
        rows |= content["rows"]
        versions = content["about"]
        about = f"{device}, torch {versions['torch']}, Triton {versions['triton']}"
    return Measured(rows, about)


def layer(name: str) -> LayerWork:
    """The layer that the benchmark measures, all heads with one pattern, in a CUDA graph."""
    shape = Shape(0)
    return layer_work(
        [find_pattern(name)()] * shape.heads,
        dtype=torch.bfloat16,
        head_dim=shape.head_dim,
        value_dim=shape.head_dim,
        kv_heads=shape.kv_heads,
        replayed=True,
    )


def tables(chip: Chip, measured: Measured) -> Iterator[str]:
    """The lines of a chip's part of the page."""
    yield f"### {chip.name}"
    yield ""
    yield rates_of(chip, measured)
    yield ""
    yield from op_table(chip, measured)
    yield ""
    yield from density_table(chip, measured)
    yield ""
    yield from crossover_table(chip, measured)


def rates_of(chip: Chip, measured: Measured) -> str:
    """Where the figures come from, as a sentence."""
    rates = f"those of {chip.measured}" if chip.measured else "assumed"
    seen = f"Measured on {measured.about}" if measured.about else "No GPU of this kind was measured"
    return f"The rates are {rates}. {seen}."


def op_table(chip: Chip, measured: Measured) -> Iterator[str]:
    """Estimation and attention of one layer, part by part."""
    yield (
        "| pattern, tokens | work | dense, ms | estimation | plan + gather | attention | "
        "times dense | host | with an index per kv head |"
    )
    yield "|---|---|---|---|---|---|---|---|---|"
    for name, row_name in LAYERS.items():
        work = layer(name)
        for length, short in LENGTHS.items():
            row = f"layer/{row_name}/{length}"
            share = measured.figure(row, "work")
            found = predict(chip, work, keys=length, density=share)
            shared = predict(chip, work, keys=length, density=share, shared_index=True)
            host = predict(chip, dataclasses.replace(work, replayed=False), keys=length).host
            dense = measured.figure(f"attention/cudnn/{length}")
            estimate, plan, attention = parts_of(measured, row)
            whole = measured.figure(row, "replayed_ms")
            speedup = dense / whole if dense and whole else None
            yield (
                f"| `{name}` {short} | {found.density:.1%} | {pair(found.dense, dense)} | "
                f"{pair(found.estimate, estimate)} | {pair(found.plan, plan)} | "
                f"{pair(found.attention, attention)} | {times(found, speedup)} | "
                f"{pair(host, scaled(measured.figure(row, 'host_us'), 1e-3))} | "
                f"{shared.speedup:.2f}x |"
            )


def parts_of(measured: Measured, row: str) -> tuple[float | None, float | None, float | None]:
    """Milliseconds of estimation, of the plan and of the attention kernel, as profiled."""
    kernels = measured.rows.get(row, {}).get("kernels")
    whole = measured.figure(row, "replayed_ms")
    if not kernels or whole is None:
        return None, None, None
    plan = kernels.get("plan_rows", 0.0) + kernels.get("gather_columns", 0.0)
    attention = kernels["sparse_attention"]
    return max(0.0, whole - plan - attention), plan, attention


def density_table(chip: Chip, measured: Measured) -> Iterator[str]:
    """The attention op alone over random lists of blocks."""
    yield "| attention alone, ms | " + " | ".join(f"density {d:.0%}" for d in DENSITIES) + " |"
    yield "|---|" + "---|" * len(DENSITIES)
    work = layer("block_sparse")
    for length, short in LENGTHS.items():
        cells = []
        for density in DENSITIES:
            found = predict(chip, work, keys=length, density=density)
            spent = measured.figure(f"attention/density {density:g}/{length}")
            cells.append(pair(found.plan + found.attention, spent))
        yield f"| {short} | " + " | ".join(cells) + " |"


def crossover_table(chip: Chip, measured: Measured) -> Iterator[str]:
    """What the compiled default chooses for one attention, as a user compiles it."""
    work = dataclasses.replace(layer("union"), replayed=False)
    least, replayed = least_lengths(chip, work), least_lengths(chip, layer("union")).keys
    yield (
        f"The default is sparse from {least.keys} tokens on ({replayed} in a CUDA graph), in "
        f"chunks of a prompt from {least.queries} queries on. As a user compiles one attention:"
    )
    yield ""
    yield "| tokens | chosen | time over dense | where nothing is sparse |"
    yield "|---|---|---|---|"
    for length in SHORT:
        found = predict(chip, work, keys=length)
        chosen = "sparse" if length >= least.keys else "dense"
        expected = 1 / found.speedup if chosen == "sparse" else 1.0
        usual, plain = (slowdown(measured, length, inputs) for inputs in ("", "plain inputs/"))
        yield f"| {length} | {chosen} | {expected:.2f} / {usual} | 1.00 / {plain} |"


def slowdown(measured: Measured, length: int, inputs: str) -> str:
    """Measured time of the compiled default over inductor's, with what was chosen."""
    name = f"crossover/{inputs}{length}"
    found = measured.figure(name, "slowdown")
    # Rows that do not say what was chosen are of the time before the guard.
    if found is None or "chosen" not in measured.rows[name]:
        return NOTHING
    return f"{found:.2f} ({measured.rows[name]['chosen']})"


def ratios(chip: Chip, measured: Measured) -> Iterator[str]:
    """Measured over predicted, part by part, to fit the constants of chips.py and its costs by."""
    seen: dict[str, list[float]] = defaultdict(list)
    for name, length in itertools.product(LAYERS, LENGTHS):
        row = f"layer/{LAYERS[name]}/{length}"
        if row not in measured.rows:
            continue
        found = predict(chip, layer(name), keys=length, density=measured.figure(row, "work"))
        host = predict(chip, dataclasses.replace(layer(name), replayed=False), keys=length).host
        launched = scaled(measured.figure(row, "host_us"), 1e-3)
        for part, predicted, spent in zip(
            ("estimation", "plan and gather", "attention", "host"),
            (found.estimate, found.plan, found.attention, host),
            (*parts_of(measured, row), launched),
            strict=True,
        ):
            if spent is not None:
                seen[part].append(spent / predicted / 1e3)
    for length in LENGTHS:
        spent = measured.figure(f"attention/cudnn/{length}")
        if spent is not None:
            seen["dense"].append(spent / 1e3 / predict(chip, layer("union"), keys=length).dense)
    for part, values in seen.items():
        middle = f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"
        yield f"{chip.name}, {part}: measured over predicted {middle}"


def times(found: Prediction, speedup: float | None) -> str:
    """`4.62x / 5.27x`."""
    return f"{found.speedup:.2f}x / " + (NOTHING if speedup is None else f"{speedup:.2f}x")


def pair(seconds: float, milliseconds: float | None) -> str:
    """`0.89 / 0.91`: predicted seconds and what was measured, in milliseconds."""
    return f"{short(1e3 * seconds)} / " + (NOTHING if milliseconds is None else short(milliseconds))


def short(value: float) -> str:
    """A number of three digits or so."""
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def scaled(value: float | None, factor: float) -> float | None:
    """A figure in another unit, if it is there."""
    return None if value is None else value * factor


def page_part(chips: list[Chip], folder: Path = RESULTS) -> str:
    """What stands in the page between its marks."""
    lines: list[str] = []
    for chip in chips:
        lines += [*tables(chip, load_results(chip, folder)), ""]
    return "\n".join(lines).rstrip() + "\n"


def with_tables(page: str, part: str) -> str:
    """A page with the part between its marks replaced."""
    before, rest = page.split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n\n{part}\n{END}{after}"


SHOWN = ("h200", "h100")
"""Chips of the page."""


def main(arguments: list[str] | None = None) -> int:
    """Print the tables, or write them into the page."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu.table", description=__doc__)
    parser.add_argument("--chips", nargs="+", choices=list(CHIPS), default=list(SHOWN))
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of gpu_*.json")
    parser.add_argument("--write", action="store_true", help="into docs/gpu.md")
    parser.add_argument("--ratios", action="store_true", help="measured over predicted alone")
    options = parser.parse_args(arguments)
    if options.ratios:
        for name in options.chips:
            print("\n".join(ratios(CHIPS[name], load_results(CHIPS[name], options.results))))
        return 0
    part = page_part([CHIPS[name] for name in options.chips], options.results)
    if options.write:
        PAGE.write_text(with_tables(PAGE.read_text(), part))
    else:
        print(part)
    return 0


if __name__ == "__main__":
    sys.exit(main())
