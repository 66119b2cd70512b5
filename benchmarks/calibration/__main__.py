"""What a searched config is worth beside one pattern for all heads, at the same measured cost.

    python -m benchmarks.calibration            # all stages, and the tables
    python -m benchmarks.calibration rivals     # turns each rival's knob to each budget
    python -m benchmarks.calibration search     # measures every head, writes the configs
    python -m benchmarks.calibration quality    # loss and attention time on texts it did not see
    python -m benchmarks.calibration needles    # strict retrieval on prompts it did not see
    python -m benchmarks.calibration report     # tables and JSON of the stages before

Finished lines are kept in --folder: a stopped stage goes on where it was. One thread by default:
attention is then timed by CPU time, which other work on the machine leaves alone. With --output the
report also writes calibration.json, the searched config and its heatmap there.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from benchmarks.calibration.report import report
from benchmarks.calibration.rivals import tune_rivals
from benchmarks.calibration.stages import needles, quality, search
from benchmarks.calibration.work import Plan, Work
from mpass.models.texts import find_text

RESULTS = Path(__file__).parents[1] / "results"
STAGES: dict[str, Callable[[Work, Plan], None]] = {
    "rivals": tune_rivals,
    "search": search,
    "quality": quality,
    "needles": needles,
}


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.calibration", description=(__doc__ or "").splitlines()[0]
    )
    parser.add_argument("stage", nargs="?", choices=(*STAGES, "report"), help="all if not given")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bf16", help="of losses, times and needles")
    parser.add_argument("--search-dtype", default="fp32", help="of the search and its costs")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--budgets", type=float, nargs="+", default=[0.15, 0.25])
    parser.add_argument(
        "--between",
        type=float,
        nargs="*",
        default=[0.13, 0.22],
        help="budgets of searched configs alone",
    )
    parser.add_argument("--search-texts", nargs="+", default=["alice", "code:131072"])
    parser.add_argument("--texts", nargs="+", default=["paradise", "lcet10", "code"])
    parser.add_argument("--needle-text", default="code", help="haystack of niah_single_2")
    parser.add_argument("--samples", type=int, default=3, help="per needle task and length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("build/calibration"))
    parser.add_argument("--output", type=Path, default=RESULTS)
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    given = parse_arguments(arguments)
    torch.set_num_threads(given.threads)
    work = Work(given.folder)
    work.folder.mkdir(parents=True, exist_ok=True)
    plan = Plan(
        model=given.model,
        dtype=given.dtype,
        search_dtype=given.search_dtype,
        length=given.length,
        budgets=tuple(given.budgets),
        between=tuple(given.between),
        search_texts=tuple(given.search_texts),
        texts=tuple(given.texts),
        needle_text=given.needle_text,
        samples=given.samples,
    )
    for text in (*plan.search_texts, *plan.texts, plan.needle_text):
        find_text(text.partition(":")[0]).read()  # a missing one is named before the work begins
    for name, stage in STAGES.items():
        if given.stage in (None, name):
            with work.timed(name):
                stage(work, plan)
    if given.stage in (None, "report"):
        report(work, plan, given.output)


if __name__ == "__main__":
    main()
