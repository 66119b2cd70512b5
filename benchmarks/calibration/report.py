"""Tables of what the stages measured, and the files that docs/calibration.md cites."""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.calibration.work import Plan, Work
from mpass.evaluate.plan import read_lines

Rows = dict[str, dict[str, dict[str, Any]]]
"""Per contestant and text: see `quality_rows`."""


def report(work: Work, plan: Plan, output: Path) -> None:
    """Print the tables in Markdown; write calibration.json, the searched config and its heatmap."""
    rows = quality_rows(read_lines(work.quality))
    rivals = [line for line in read_lines(work.rivals) if "name" in line]
    found = read_lines(work.needles)
    comparison, equal = compare(rows, plan), equal_quality(rows, plan.texts)
    times = stage_times(read_lines(work.times))
    searched = json.loads(work.search.read_text("utf-8"))
    print_quality(rows, plan, rivals)
    print_comparison(comparison)
    for line in equal:
        print(
            f"\n{line['searched']} is no worse than {line['rival']}: "
            f"{line['searched_seconds']:.2f} s of attention, {line['rival_seconds']:.2f} s"
        )
    print_needles(found)
    print_predictions(searched)
    for stage, figures in times.items():
        print(
            f"\n{stage}: {figures['cpu_seconds']:.0f} s of CPU time, "
            f"{figures['wall_seconds']:.0f} s, at most {figures['peak_gib']:.1f} GiB"
        )
    whole = {
        "search": searched,
        "times": times,
        "rivals": rivals,
        "quality": read_lines(work.quality),
        "comparison": comparison,
        "equal_quality": equal,
        "needles": found,
    }
    output.mkdir(parents=True, exist_ok=True)
    (output / "calibration.json").write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    best = work.config("searched", plan.largest)
    shutil.copy(best, output / "calibration_searched.json")
    shutil.copy(best.with_suffix(".svg"), output / "calibration.svg")


def quality_rows(lines: Sequence[dict[str, Any]]) -> Rows:
    """Per contestant and text: divergence from dense, loss over it, attention time and its share.

    increases: of the loss in each stretch of the text; increase: over the whole text.
    """
    dense = {line["text"]: line for line in lines if line["name"] == "dense"}
    rows: Rows = {}
    for line in lines:
        if line["name"] == "dense":
            continue
        exact = dense[line["text"]]
        rows.setdefault(line["name"], {})[line["text"]] = {
            "increase": line["loss"] - exact["loss"],
            "increases": [a - b for a, b in zip(line["parts"], exact["parts"], strict=True)],
            "divergence": line["divergence"],
            "share": line["seconds"] / exact["seconds"],
            "seconds": line["seconds"],
        }
    return rows


def mean(row: dict[str, dict[str, Any]], figure: str) -> float:
    """Of a contestant's figure over its texts."""
    return statistics.fmean(values[figure] for values in row.values())


def stretches(row: dict[str, dict[str, Any]], texts: Sequence[str]) -> list[float]:
    """Increases of a contestant in all stretches of all texts, in their order."""
    return [value for text in texts for value in row[text]["increases"]]


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    """Mean and its standard error."""
    return statistics.fmean(values), statistics.stdev(values) / len(values) ** 0.5


def compare(rows: Rows, plan: Plan) -> list[dict[str, Any]]:
    """Each contestant that ran on all texts beside the searched config of its budget.

    Means over the texts. `more`: by how much its loss rises more than that of the searched config,
    with the standard error over the stretches of all texts, in each of which both are compared.
    """
    table = []
    for name in sorted(rows, key=order_of):
        row = rows[name]
        if set(row) < set(plan.texts):
            continue
        ours = rows.get(f"searched @ {name.partition(' @ ')[2]}", row)
        own, beside = stretches(row, plan.texts), stretches(ours, plan.texts)
        increase, error = mean_and_error(own)
        more, more_error = mean_and_error([a - b for a, b in zip(own, beside, strict=True)])
        table.append(
            {
                "name": name,
                "divergence": mean(row, "divergence"),
                "increase": increase,
                "increase_error": error,
                "share": mean(row, "share"),
                "seconds": mean(row, "seconds"),
                "more": more,
                "more_error": more_error,
            }
        )
    return table


def equal_quality(rows: Rows, texts: Sequence[str]) -> list[dict[str, Any]]:
    """Per rival on all texts: the fastest searched config that is no worse than it.

    No worse: neither divergence nor increase of the loss is higher, means over the texts.
    """
    complete = [name for name in rows if set(texts) <= set(rows[name])]
    searched = [name for name in complete if name.startswith("searched")]
    found = []
    for rival in sorted(set(complete) - set(searched), key=order_of):
        as_good = [
            name
            for name in searched
            if all(
                mean(rows[name], figure) <= mean(rows[rival], figure)
                for figure in ("divergence", "increase")
            )
        ]
        if as_good:
            fastest = min(as_good, key=lambda name: mean(rows[name], "seconds"))
            figures: dict[str, Any] = {"rival": rival, "searched": fastest}
            for who, name in (("rival", rival), ("searched", fastest)):
                for figure in ("divergence", "increase", "seconds"):
                    figures[f"{who}_{figure}"] = mean(rows[name], figure)
            found.append(figures)
    return found


def stage_times(lines: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Per stage the sums over all its runs, and the highest peak."""
    times: dict[str, dict[str, float]] = {}
    for line in lines:
        of_stage = times.setdefault(
            line["stage"], {"cpu_seconds": 0.0, "wall_seconds": 0.0, "peak_gib": 0.0}
        )
        of_stage["cpu_seconds"] += line["cpu_seconds"]
        of_stage["wall_seconds"] += line["wall_seconds"]
        of_stage["peak_gib"] = max(of_stage["peak_gib"], line["peak_gib"])
    return times


def order_of(name: str) -> tuple[str, bool, str]:
    """Contestants by budget, the searched one first."""
    rival, _, budget = name.partition(" @ ")
    return budget, rival != "searched", rival


def print_quality(rows: Rows, plan: Plan, rivals: Sequence[dict[str, Any]]) -> None:
    """Per contestant and text: divergence, increase of the loss in brackets, share of the time."""
    patterns = {f"{line['name']} @ {line['budget']:g}": line["pattern"] for line in rivals}
    print("\n| choice | pattern |" + "".join(f" {text} |" for text in plan.texts))
    print("| --- | --- |" + " --- |" * len(plan.texts))
    for name in sorted(rows, key=order_of):
        cells = ""
        for text in plan.texts:
            row = rows[name].get(text)
            cells += (
                f" {row['divergence']:.4f} ({row['increase']:+.4f}) at {row['share']:.1%} |"
                if row
                else " |"
            )
        print(f"| {name} | {patterns.get(name, 'per head')} |{cells}")
    for name, pattern in patterns.items():
        if pattern is None:
            print(f"| {name} | no size costs so little |" + " |" * len(plan.texts))


def print_comparison(comparison: Sequence[dict[str, Any]]) -> None:
    """Means over the texts, with standard errors."""
    print("\n| choice | divergence | increase of the loss | attention | more than searched |")
    print("| --- | --- | --- | --- | --- |")
    for line in comparison:
        print(
            f"| {line['name']} | {line['divergence']:.4f} | {line['increase']:+.4f} ± "
            f"{line['increase_error']:.4f} | {line['seconds']:.2f} s, {line['share']:.1%} | "
            f"{line['more']:+.4f} ± {line['more_error']:.4f} |"
        )


def print_needles(found: Sequence[dict[str, Any]]) -> None:
    """Per task and length the prompts that dense answers, and how many of them each one answers."""
    columns = sorted({(line["length"], line["task"]) for line in found})
    answered = {
        (line["length"], line["task"], line["seed"])
        for line in found
        if line["name"] == "dense" and line["score"] > 0
    }
    print("\n| choice |" + "".join(f" {task}, {length} |" for length, task in columns))
    print("| --- |" + " --- |" * len(columns))
    for name in sorted({line["name"] for line in found}, key=order_of):
        cells = ""
        for column in columns:
            scores = [
                line["score"]
                for line in found
                if line["name"] == name
                and (line["length"], line["task"]) == column
                and (name == "dense" or (*column, line["seed"]) in answered)
            ]
            cells += f" {sum(scores):g} of {len(scores)} |"
        print(f"| {name} |{cells}")


def print_predictions(searched: dict[str, Any], most: float = 0.26) -> None:
    """What the search predicts for one candidate in all heads, and how layers differ.

    most: dearer candidates are left out, share of dense attention's time.
    """
    print("\n| candidate in all heads | cost | predicted divergence |")
    print("| --- | --- | --- |")
    for name, figures in sorted(searched["uniform"].items(), key=lambda item: item[1]["loss"]):
        if figures["share"] <= most:
            print(f"| {name} | {figures['share']:.1%} | {figures['loss']:.4f} |")
    for kind, slopes in searched["slopes"].items():
        cells = ", ".join(f"{slope:.2g}" for slope in slopes)
        print(f"\ndivergence per squared error by layer, {kind}: {cells}")
