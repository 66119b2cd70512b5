"""The evaluation: every task, length, seed and pattern, dense beside sparse, one JSON line each.

A line is written when its measurement is done, and a run that finds it skips it: an evaluation can
be stopped and started again, or widened.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mpass.errors import OptionValueError
from mpass.evaluate.environment import describe_environment
from mpass.evaluate.plan import (
    DENSE,
    LOSSES,
    SLIDING,
    Case,
    Plan,
    case_of,
    check_plan,
    list_inputs,
    read_lines,
)
from mpass.evaluate.runner import Runner
from mpass.evaluate.samples import Sample, fit
from mpass.evaluate.tasks import Haystack, grid_puzzle, make_haystack, make_puzzle
from mpass.models.load import load_config, load_model, parse_dtype
from mpass.models.texts import find_text, load_tokens


def evaluate(
    plan: Plan, output: Path, on_progress: Callable[[str], None] = lambda step: None
) -> list[dict[str, Any]]:
    """Measure what `output` does not have yet, adding a JSON line each; returns all of the plan's.

    on_progress is told of every input, measured or skipped. Raises the errors of `check_plan`,
    `load_model` and `load_tokens`.
    """
    check_plan(plan)
    dtype = parse_dtype(plan.dtype)
    limit = load_config(plan.model, dtype=dtype).get_text_config().max_position_embeddings
    for length in plan.lengths:
        if length > limit:
            raise OptionValueError("lengths", length, f"at most {limit}, as {plan.model} has them")
    done = {case_of(line): line for line in read_lines(output)}
    model, tokenizer = load_model(plan.model, dtype=dtype, device=plan.device)
    text = find_text(plan.text).read()
    haystack = make_haystack(plan.text, text)
    runner = Runner(model, tokenizer, plan)
    wanted = []
    written = output.read_bytes() if output.is_file() else b""
    cut_off = written and not written.endswith(b"\n")
    with output.open("a", encoding="utf-8") as file:
        if cut_off:
            file.write("\n")
        for task, length, seed, depth in list_inputs(plan):
            on_progress(f"{task}, {length} tokens, {seed + 1} of {plan.samples}")
            cases = {
                name: Case(plan.model, plan.dtype, plan.text, task, length, seed, name, depth)
                for name in (DENSE, *plan.patterns)
            }
            wanted += list(cases.values())
            missing = [name for name, case in cases.items() if case not in done]
            if not missing:
                continue
            sample = make_sample(task, length, seed, depth, text, haystack, tokenizer)
            for name, measured in runner.measure(sample, missing):
                line = (
                    dataclasses.asdict(cases[name])
                    | measured
                    | {"versions": describe_environment()}
                )
                file.write(json.dumps(line) + "\n")
                file.flush()
                done[cases[name]] = line
    return [done[case] for case in wanted]


def make_sample(
    task: str,
    length: int,
    seed: int,
    depth: float | None,
    text: str,
    haystack: Haystack,
    tokenizer: Any,
) -> Sample:
    """The input of a case. Perplexity: window number `seed` of the text, no answers."""
    if task in LOSSES:
        step = length // 4 if task == SLIDING else length
        return Sample(load_tokens(text, tokenizer, length, skip=seed * step), (), (), length)
    if depth is not None:
        return fit(grid_puzzle(depth, seed, haystack), tokenizer, length)
    return fit(make_puzzle(task, seed, haystack), tokenizer, length)
