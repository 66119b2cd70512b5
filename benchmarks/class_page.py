"""Write docs/appendix/classes.md from the records of every class in transformers' mappings.

    mpass coverage --kind causal --kind image-text --kind encoder-decoder --scenario no_cache \
        -o benchmarks/results/classes.jsonl
    mpass coverage --kind causal --scenario no_cache_left --scenario dynamic_chunk \
        --scenario static_prefill --scenario static_chunk --scenario turns \
        -o benchmarks/results/classes_scenarios.jsonl
    python benchmarks/class_page.py
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from mpass.evaluate.classes import ClassRecord, kind_of_reason, read_records, summarise
from mpass.story.remedies import remedy_of

ROOT = Path(__file__).parent.parent
RECORDS = ROOT / "benchmarks" / "results" / "classes.jsonl"
SCENARIOS = ROOT / "benchmarks" / "results" / "classes_scenarios.jsonl"
"""Runs of as many classes as there was time for, in the other scenarios."""
PAGE = ROOT / "docs" / "appendix" / "classes.md"

HEAD = """# Every class of transformers

This page lists what becomes of every class that transformers {version} names for causal,
image-text and encoder-decoder tasks, in a tiny model of each.

The prompts are text of 37 tokens without a cache (`no_cache`), budgets are full, so that the output
must be that of eager attention, and the inner backend is eager. Vision towers run only where a
class refuses text alone. `python benchmarks/class_page.py` writes this page from
[the records](../../benchmarks/results/classes.jsonl), which this makes:

```
mpass coverage --kind causal --kind image-text --kind encoder-decoder \\
    --scenario no_cache -o benchmarks/results/classes.jsonl
```

{note}
"""

NOTE = (
    "They were made in parts, with the same versions of torch and transformers; classes that "
    "stayed dense, or of which less was found than ran, were run again after later changes. "
    "Where Dynamo's own graph gives another output than the eager model, because the model chooses "
    "another mask while it is compiled, the pass is held against that graph."
)


def cell(text: str) -> str:
    """Text that a table's cell can hold."""
    return text.replace("|", "\\|").replace("\n", " ")


def counts(records: list[ClassRecord]) -> list[str]:
    """The table of sums."""
    lines = [
        "| kind | classes | run | attentions | sparse | share | differ from eager | no attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for one in summarise(records):
        share = f"{one.sparse / max(1, one.attentions):.1%}"
        lines.append(
            f"| {one.kind} | {one.classes} | {one.run} | {one.attentions} | {one.sparse} | {share} "
            f"| {len(one.differ)} | {len(one.without)} |"
        )
    return lines


def reasons(records: list[ClassRecord]) -> list[str]:
    """The table of reasons to stay dense, the most frequent first."""
    found: Counter[str] = Counter()
    classes: dict[str, set[str]] = {}
    for record in records:
        for reason, count in record.dense.items():
            kind = kind_of_reason(reason)
            found[kind] += count
            classes.setdefault(kind, set()).add(record.model_type)
    lines = ["| attentions | reason | what to do | classes |", "|---|---|---|---|"]
    for reason, count in found.most_common():
        names = ", ".join(sorted(classes[reason]))
        lines.append(f"| {count} | {cell(reason)} | {cell(remedy_of(reason))} | {names} |")
    return lines


def classes(records: list[ClassRecord]) -> list[str]:
    """The table of classes."""
    lines = ["| class | of | sparse | found | counted | to eager |", "|---|---|---|---|---|---|"]
    for r in sorted(records, key=lambda record: (record.kind, record.model_type)):
        if r.not_run or r.error:
            told = f"not run: {cell(r.not_run or r.error)[:90]}"
            lines.append(f"| {r.architecture} | {r.name} | {told} | | | |")
            continue
        away = f"{r.difference:.1e}" + " (as Dynamo's graph)" * (r.of_dynamo > 1e-4)
        what = "no attention" if not (r.sites or r.attentions) else str(r.sparse)
        lines.append(
            f"| {r.architecture} | {r.name} | {what} | {r.sites} | {r.attentions} | {away} |"
        )
    return lines


def scenarios(records: list[ClassRecord], plain: list[ClassRecord]) -> list[str]:
    """The table of other scenarios, and what is dense in them but not without a cache."""
    known = {record.name: record for record in plain}
    by_scenario: dict[str, list[ClassRecord]] = {}
    for record in records:
        if record.scenario and not record.not_run:
            by_scenario.setdefault(record.scenario, []).append(record)
    lines = [
        "| scenario | classes | attentions | sparse | share | differ from eager |",
        "|---|---|---|---|---|---|",
    ]
    more: Counter[str] = Counter()
    names: dict[str, set[str]] = {}
    for scenario, those in by_scenario.items():
        attentions = sum(max(r.attentions, r.sites) for r in those)
        sparse = sum(r.sparse for r in those)
        differ = ", ".join(sorted(r.name for r in those if not r.equal)) or "0"
        share = f"{sparse / max(1, attentions):.1%}"
        lines.append(
            f"| {scenario} | {len(those)} | {attentions} | {sparse} | {share} | {differ} |"
        )
        for record in those:
            before = {kind_of_reason(reason) for reason in known[record.name].dense}
            for reason, count in record.dense.items():
                kind = kind_of_reason(reason)
                if kind not in before:
                    more[kind] += count
                    names.setdefault(kind, set()).add(f"{record.model_type} ({scenario})")
    lines += [
        "\nReasons to stay dense that these classes do not have without a cache:\n",
        "| attentions | reason | what to do | classes |",
        "|---|---|---|---|",
    ]
    for reason, count in more.most_common():
        told = ", ".join(sorted(names[reason]))
        lines.append(f"| {count} | {cell(reason)} | {cell(remedy_of(reason))} | {told} |")
    return lines


def main() -> None:
    """Write the page."""
    import transformers

    records = read_records(RECORDS)
    missed = sorted(r.name for r in records if r.attentions > r.sites)
    text = [
        HEAD.format(version=transformers.__version__, note=NOTE),
        "## Sums\n",
        *counts(records),
        "\n`attentions` counts those over the whole prompt that ran eagerly, or what the pass "
        "found, whichever is more. `sparse` counts those under a mask that is read at run time as "
        "well, which run sparse or dense by what it is.\n",
        "## Why attention stays dense\n",
        *reasons(records),
        f"\nClasses of which fewer attentions were found than ran: {', '.join(missed)}. "
        "Where Dynamo breaks the graph in every layer, as at a router that counts its tokens, one "
        "graph serves all layers that it fits, and its attention is counted for each that ran.\n",
        "## Other scenarios\n",
        "As many causal classes as there was time for also ran padded on the left "
        "(`no_cache_left`), into a static cache (`static_prefill`), in the second part of a prompt "
        "over both caches (`dynamic_chunk`, `static_chunk`), and in `turns`: a prompt in two parts "
        "and a second question "
        "([the records](../../benchmarks/results/classes_scenarios.jsonl)).\n",
        *scenarios(read_records(SCENARIOS), records),
        "\n## Classes\n",
        *classes(records),
    ]
    PAGE.write_text("\n".join(text) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
