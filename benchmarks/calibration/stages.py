"""The stages: search, quality on texts and retrieval that the search did not see."""

from __future__ import annotations

import json
from typing import Any

import torch

from benchmarks.calibration.rivals import tuned_patterns
from benchmarks.calibration.work import Plan, Work, append, load_window, model_and_tokenizer
from mpass.calibration.candidates import default_candidates
from mpass.calibration.check import Timed, attend_with
from mpass.calibration.instrument import attend_dense
from mpass.calibration.probe import Input, Probe, as_input
from mpass.calibration.report import heatmap
from mpass.calibration.search import Calibration, run_calibration
from mpass.calibration.settings import Settings
from mpass.cli.calibrate import SHORT_PROMPT, retrieval_prompts
from mpass.config.sparse_config import SparseConfig
from mpass.evaluate.environment import describe_environment
from mpass.evaluate.plan import read_lines
from mpass.evaluate.run import make_sample
from mpass.evaluate.score import strict_score
from mpass.evaluate.tasks import make_haystack
from mpass.models.texts import find_text

OBJECTIVES = {"searched": "divergence", "least error": "error", "most recall": "recall"}
"""What the heads are chosen by; all but the first are there to be compared with."""

NEEDLES = ("niah_single_1", "niah_single_2", "passkey")
FAMILIES = 3
"""Rivals that are run at the smaller budgets: the best so many of the largest."""

HOPELESS = 2
"""Prompts after which a task that the dense model never answers is given up."""

PARTS = 16
"""Stretches of a text whose losses are kept: differences between them give standard errors."""


def search(work: Work, plan: Plan) -> None:
    """Measure every head, choose for every budget, write configs and heatmaps."""
    model, tokenizer = model_and_tokenizer(plan.model, plan.search_dtype)
    inputs = [load_window(text, tokenizer, plan.length) for text in plan.search_texts]
    inputs += retrieval_prompts(
        tokenizer,
        plan.search_texts[0].partition(":")[0],
        sorted({SHORT_PROMPT, plan.length}),
        first_seed=1000,
    )
    candidates = search_space(work)
    shares = {}
    wanted = [("searched", budget) for budget in (*plan.budgets, *plan.between)]
    wanted += [(name, plan.largest) for name in OBJECTIVES if name != "searched"]
    for name, budget in wanted:
        outcome = run_calibration(
            model,
            inputs,
            candidates=candidates,
            settings=Settings(budget=budget, objective=OBJECTIVES[name]),
            state=work.state,
            on_progress=lambda step, done, total: print(step, flush=True),
        )
        outcome.config.save(work.config(name, budget))
        work.config(name, budget).with_suffix(".svg").write_text(heatmap(outcome), "utf-8")
        shares[f"{name} @ {budget:g}"] = outcome.chosen_seconds / outcome.dense_seconds
        if OBJECTIVES[name] == Settings().objective:
            uniform = uniform_losses(outcome)  # the same at every budget
            slopes = {kind: values.tolist() for kind, values in outcome.slopes.items()}
    figures = {
        "layers_heads_candidates": list(outcome.losses.shape),
        "kernel": outcome.kernel.as_dict(),
        "shares": shares,
        "uniform": uniform,
        "slopes": slopes,
        "versions": describe_environment(),
    }
    work.search.write_text(json.dumps(figures, indent=2) + "\n", "utf-8")


def search_space(work: Work) -> tuple[Any, ...]:
    """The default candidates, and the rivals of their best family exactly as they were tuned.

    So the knapsack may always take the rival for all heads: its prediction is never worse.
    """
    tuned = [pattern for pattern in tuned_patterns(work).values() if pattern.name == "union"]
    return tuple(dict.fromkeys((*default_candidates(), *tuned)))


def uniform_losses(outcome: Calibration) -> dict[str, dict[str, float]]:
    """Per candidate what it costs and would lose, as predicted, if all heads had it."""
    losses, costs = outcome.losses.sum((0, 1)), outcome.costs.sum((0, 1))
    return {
        str(candidate): {
            "share": float(costs[number]) / outcome.dense_seconds,
            "loss": float(losses[number]),
        }
        for number, candidate in enumerate(outcome.candidates)
    }


def contestants(work: Work, plan: Plan) -> dict[str, SparseConfig]:
    """The searched configs and all rivals, by `name @ budget`."""
    found = {
        f"{name} @ {budget:g}": SparseConfig.load(work.config(name, budget))
        for name in OBJECTIVES
        for budget in (*plan.budgets, *plan.between)
        if work.config(name, budget).is_file()
    }
    return found | {name: SparseConfig(pattern) for name, pattern in tuned_patterns(work).items()}


def quality(work: Work, plan: Plan) -> None:
    """Loss, divergence and attention time of the contestants, a line per text and contestant.

    All rivals of the largest budget run on the first text, and the configs of other objectives; the
    best rivals at the smaller budgets too. The searched configs, and of each budget the best rivals
    there and vertical_slash, go on to the other texts.
    """
    model, tokenizer = model_and_tokenizer(plan.model, plan.dtype)
    everyone = contestants(work, plan)
    searched = {name for name in everyone if name.startswith("searched @")}
    probe = Probe(model)
    for text in plan.texts:
        run = TextRun(work, probe, text, as_input(load_window(text, tokenizer, plan.length)))
        run(everyone, searched)
        if text == plan.texts[0]:
            largest = f" @ {plan.largest:g}"
            run(everyone, {name for name in everyone if name.endswith(largest)})
            best = best_rivals(work, plan, plan.largest, FAMILIES)
            families = {name.partition(" @ ")[0] for name in best}
            run(everyone, {n for n in everyone if n.partition(" @ ")[0] in families})
        else:
            run(everyone, {n for b in plan.budgets for n in best_rivals(work, plan, b)})


class TextRun:
    """The contestants on one text; dense runs once, when it is first needed."""

    def __init__(self, work: Work, probe: Probe, text: str, item: Input) -> None:
        self.work, self.probe, self.text, self.item = work, probe, text, item
        self.exact: torch.Tensor | None = None
        self.done = {line["name"] for line in read_lines(work.quality) if line["text"] == text}

    def __call__(self, everyone: dict[str, SparseConfig], names: set[str]) -> None:
        """Run those of `names` that have no line yet."""
        for name in sorted((names & set(everyone)) - self.done):
            if self.exact is None:
                self.exact = self.measure("dense", None)
            self.measure(name, everyone[name])

    def measure(self, name: str, config: SparseConfig | None) -> torch.Tensor:
        """Run one contestant and write its line; returns the hidden states."""
        attend = Timed(attend_dense if config is None else attend_with(config))
        out = self.probe.run(self.item.tokens, attend)
        if name in self.done:
            return out
        losses = self.probe.losses(out, self.item)
        line: dict[str, Any] = {
            "text": self.text,
            "name": name,
            "loss": float(losses.mean()),
            "parts": [float(part.mean()) for part in losses.tensor_split(PARTS)],
            "seconds": attend.seconds,
        }
        if self.exact is not None:
            line["divergence"] = self.probe.divergence(self.exact, out, self.item)
        append(self.work.quality, line)
        self.done.add(name)
        return out


def best_rivals(work: Work, plan: Plan, budget: float, count: int = 1) -> set[str]:
    """The rivals of a budget that are best on the first text, and vertical_slash.

    Best: the `count` of least loss and the `count` of least divergence.
    """
    rivals = [
        line
        for line in read_lines(work.quality)
        if line["text"] == plan.texts[0]
        and line["name"].endswith(f" @ {budget:g}")
        and line["name"].partition(" @ ")[0] not in OBJECTIVES
    ]
    best = {f"vertical_slash @ {budget:g}"}
    for figure in ("loss", "divergence"):
        ranked = sorted(rivals, key=lambda line, figure=figure: line[figure])  # type: ignore[misc]
        best |= {line["name"] for line in ranked[:count]}
    return best


def needles(work: Work, plan: Plan) -> None:
    """Strict retrieval: whether every token of the answer is the most likely one.

    A prompt that the dense model does not answer tells nothing about retention, and is run dense
    alone; after `HOPELESS` of them and no other a task is given up at that length.
    """
    model, tokenizer = model_and_tokenizer(plan.model, plan.dtype)
    names = {f"searched @ {plan.largest:g}", *best_rivals(work, plan, plan.largest)}
    everyone = contestants(work, plan)
    chosen = {"dense": None, **{name: everyone[name] for name in sorted(names & set(everyone))}}
    content = find_text(plan.needle_text).read()
    hay = make_haystack(plan.needle_text, content)
    probe = Probe(model)
    scores = {needle_key(line): line["score"] for line in read_lines(work.needles)}
    for seed in range(plan.samples):
        for length in (plan.length // 2, plan.length):
            for task in NEEDLES:
                known = [scores.get((task, length, n, "dense"), 1.0) for n in range(seed)]
                if len(known) >= HOPELESS and not any(known):
                    continue
                sample = make_sample(task, length, seed, None, content, hay, tokenizer)
                for name, config in chosen.items():
                    key = (task, length, seed, name)
                    if scores.get((task, length, seed, "dense")) == 0:
                        break
                    if key in scores:
                        continue
                    attend = attend_dense if config is None else attend_with(config)
                    hidden = probe.run(sample.tokens, attend)
                    scores[key] = strict_score(model, hidden[None], sample)
                    line = {"task": task, "length": length, "seed": seed, "name": name}
                    append(work.needles, line | {"score": scores[key]})


def needle_key(line: dict[str, Any]) -> tuple[str, int, int, str]:
    """Which prompt and which contestant a line of `needles` is about."""
    return line["task"], line["length"], line["seed"], line["name"]
