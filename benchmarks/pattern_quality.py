"""What patterns cost a real model: loss over dense on long texts and strict needle retention.

    python benchmarks/pattern_quality.py 'union' 'vertical_slash(1000, 512)'

Every input is one prefill of the whole model through the public backend, all layers sparse. Lines
of finished inputs stay in --output, so that an interrupted run goes on where it stopped.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from mpass.evaluate.plan import PERPLEXITY, Plan
from mpass.evaluate.run import evaluate
from mpass.evaluate.summary import summarize

NEEDLES = ("niah_single_1", "niah_single_2", "passkey")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("patterns", nargs="+", help="as `mpass` takes them: name or name(1, x=2)")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="*", default=["code", "alice", "paradise"])
    parser.add_argument("--length", type=int, default=8192, help="tokens of a text")
    parser.add_argument("--needle-length", type=int, default=4096, help="tokens around a needle")
    parser.add_argument("--needles", type=int, default=5, help="samples per task; 0 for none")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("pattern_quality.jsonl"))
    return parser.parse_args()


def make_plans(arguments: argparse.Namespace) -> list[Plan]:
    """One plan per text, and one for the needles."""
    common = {"model": arguments.model, "patterns": tuple(arguments.patterns)}
    plans = [
        Plan(tasks=(PERPLEXITY,), lengths=(arguments.length,), samples=1, text=text, **common)
        for text in arguments.texts
    ]
    if arguments.needles:
        plans.append(
            Plan(
                tasks=NEEDLES,
                lengths=(arguments.needle_length,),
                samples=arguments.needles,
                **common,
            )
        )
    return plans


def rows_of(lines: Iterable[dict[str, Any]], text: str) -> list[str]:
    """Table rows of one plan: pattern, what, density, result."""
    lines = list(lines)
    rows = []
    for summary in summarize(lines):
        what = f"{summary.task}, {summary.length}"
        result = f"{summary.score:.2f} (dense {summary.dense:.2f})"
        if summary.task == PERPLEXITY:
            what = f"{text}, {summary.length}"
            own = next(
                line
                for line in lines
                if line["pattern"] == summary.pattern and line["task"] == PERPLEXITY
            )
            last = own["sparse_quarters"][-1] - own["dense_quarters"][-1]
            result = f"{summary.score:+.4f} nats ({last:+.4f} in the last quarter)"
        rows.append(f"| {summary.pattern} | {what} | {summary.density:.3f} | {result} |")
    return rows


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    print("| pattern | input | density | loss over dense, or needles found |", flush=True)
    print("|---|---|---|---|", flush=True)
    for plan in make_plans(arguments):
        for row in rows_of(evaluate(plan, arguments.output), plan.text):
            print(row, flush=True)


if __name__ == "__main__":
    main()
