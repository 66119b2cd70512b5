"""The evaluation: every task, length, seed and pattern, dense beside sparse, one JSON line each.

A line is written when its measurement is done, and a run that finds it skips it: an evaluation can
be stopped and started again, or widened.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpass.demo import environment
from mpass.errors import OptionValueError, nearest
from mpass.evaluate.samples import Sample, fit
from mpass.evaluate.score import compare_losses, strict_score
from mpass.evaluate.tasks import TASKS, Haystack, grid_puzzle, make_haystack, make_puzzle
from mpass.lowering.record import record
from mpass.models import check_device, load_config, load_model
from mpass.options import INNER_BACKENDS
from mpass.parse import parse_dtype, parse_pattern
from mpass.prefill import compile_body, prefill
from mpass.texts import find_text, load_tokens

PERPLEXITY = "perplexity"
GRID = "needle_grid"
GRID_DEPTHS = 5
COUNTED = 0.2
"""What the dense model solves less often than this at a length says nothing about sparsity."""

DENSE = "dense"


@dataclass(frozen=True)
class Plan:
    """What to evaluate. samples: seeds per task and length; windows of text for perplexity."""

    model: str = "smollm2"
    tasks: tuple[str, ...] = ("niah_single_1", "niah_single_2", "passkey", PERPLEXITY)
    lengths: tuple[int, ...] = (4096,)
    patterns: tuple[str, ...] = ("vertical_slash",)
    samples: int = 5
    text: str = "code"
    dtype: str = "bf16"
    device: str = "cpu"
    min_seq_len: int = 0
    inner_backend: str = "eager"


@dataclass(frozen=True)
class Case:
    """One measurement: the key under which a line is found again."""

    model: str
    dtype: str
    text: str
    task: str
    length: int
    seed: int
    pattern: str
    depth: float | None = None


def check_plan(plan: Plan) -> None:
    """Raise the error of whatever is wrong, before anything is loaded or run."""
    known = [*TASKS, GRID, PERPLEXITY]
    for task in plan.tasks:
        if task not in known:
            raise OptionValueError("tasks", task + nearest(task, known), ", ".join(known))
    for pattern in plan.patterns:
        parse_pattern(pattern)
    parse_dtype(plan.dtype)
    check_device(plan.device)
    find_text(plan.text)
    if plan.inner_backend not in INNER_BACKENDS:
        raise OptionValueError("inner_backend", plan.inner_backend, ", ".join(INNER_BACKENDS))
    for length in plan.lengths:
        if length < 256:
            raise OptionValueError("lengths", length, "256 tokens and more")
    if plan.samples < 1:
        raise OptionValueError("samples", plan.samples, "an int >= 1")


def list_inputs(plan: Plan) -> Iterator[tuple[str, int, int, float | None]]:
    """(task, length, seed, depth) of every input, by length: one compiled graph serves a length."""
    for length in plan.lengths:
        for task in plan.tasks:
            for seed in range(plan.samples):
                if task == GRID:
                    for step in range(GRID_DEPTHS):
                        yield task, length, seed, step / (GRID_DEPTHS - 1)
                else:
                    yield task, length, seed, None


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The measurements of earlier runs; a last line that was cut off is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return lines


def case_of(line: dict[str, Any]) -> Case:
    """The key of a saved line."""
    return Case(**{field.name: line[field.name] for field in dataclasses.fields(Case)})


def evaluate(
    plan: Plan, output: Path, announce: Callable[[str], None] = lambda step: None
) -> list[dict[str, Any]]:
    """Measure what `output` does not have yet, adding a JSON line each; returns all of the plan's.

    announce is told of every input, measured or skipped. Raises the errors of `check_plan`,
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
    runner = Runner(model, plan)
    wanted = []
    cut_off = output.is_file() and not output.read_bytes().endswith(b"\n")
    with output.open("a", encoding="utf-8") as file:
        if cut_off:
            file.write("\n")
        for task, length, seed, depth in list_inputs(plan):
            announce(f"{task}, {length} tokens, {seed + 1} of {plan.samples}")
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
                line = dataclasses.asdict(cases[name]) | measured | {"versions": environment()}
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
    if task == PERPLEXITY:
        tokens = load_tokens(text, tokenizer, (seed + 1) * length)[:, seed * length :]
        return Sample(tokens, (), ())
    if depth is not None:
        return fit(grid_puzzle(depth, seed, haystack), tokenizer, length)
    return fit(make_puzzle(task, seed, haystack), tokenizer, length)


class Runner:
    """The model's body compiled once per pattern, and the measurements of one input."""

    def __init__(self, model: Any, plan: Plan) -> None:
        torch._dynamo.reset()
        self.model = model
        self.device = plan.device
        self.forwards = {DENSE: compile_body(model, plan.inner_backend, dynamic=False)}
        for text in plan.patterns:
            options = {
                "pattern": parse_pattern(text),
                "min_seq_len": plan.min_seq_len,
                "inner_backend": plan.inner_backend,
            }
            self.forwards[text] = compile_body(model, "minference", options, dynamic=False)

    def measure(self, sample: Sample, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(pattern, its figures) for each of `names`; perplexity also compares with dense."""
        tokens = sample.tokens.to(self.device)
        dense, _ = self.hidden(DENSE, tokens)
        for name in names:
            hidden, density = (dense, 1.0) if name == DENSE else self.hidden(name, tokens)
            figures: dict[str, Any] = {"density": density}
            if sample.spans:
                figures["score"] = strict_score(self.model, hidden, sample)
            else:
                losses = compare_losses(self.model, dense, hidden, tokens)
                figures |= dataclasses.asdict(losses)
            yield name, figures

    def hidden(self, name: str, tokens: Tensor) -> tuple[Tensor, float]:
        """Last hidden states [1, N, hidden] and the mean density of the model's attention."""
        # Beyond its limit Dynamo would run the rest uncompiled, which is dense, and say nothing.
        limits = torch._dynamo.config.patch(
            recompile_limit=1 << 16,
            accumulated_recompile_limit=1 << 16,
            fail_on_recompile_limit_hit=True,
        )
        with limits, record() as log:
            output = prefill(self.forwards[name], tokens)
        layers = self.model.config.get_text_config().num_hidden_layers
        measured = [float(call.density.mean()) for call in log.calls]
        density = (sum(measured) + layers - len(measured)) / layers
        return output.last_hidden_state, density


@dataclass(frozen=True)
class Summary:
    """A task at a length with a pattern, over its samples.

    score: mean strict score, or the increase in nats per token over dense for perplexity;
    dense: the dense model's score, or its nats per token; counted: whether the dense model can do
    the task at all.
    """

    task: str
    length: int
    pattern: str
    score: float
    dense: float
    density: float
    counted: bool


def summarize(lines: Iterable[dict[str, Any]]) -> list[Summary]:
    """Means over the samples of each task, length and pattern other than dense."""
    groups: dict[tuple[str, int, str], list[dict[str, Any]]] = defaultdict(list)
    for line in lines:
        groups[line["task"], line["length"], line["pattern"]].append(line)
    summaries = []
    for (task, length, pattern), group in groups.items():
        if pattern == DENSE:
            continue
        density = statistics.fmean(line["density"] for line in group)
        if task == PERPLEXITY:
            dense = statistics.fmean(line["dense"] for line in group)
            score = statistics.fmean(line["sparse"] for line in group) - dense
            counted = True
        else:
            score = statistics.fmean(line["score"] for line in group)
            dense = statistics.fmean(line["score"] for line in groups[task, length, DENSE])
            counted = dense >= COUNTED
        summaries.append(Summary(task, length, pattern, score, dense, density, counted))
    return summaries
