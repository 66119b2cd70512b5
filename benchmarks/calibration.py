"""What a searched config is worth beside one pattern for all heads, at the same measured cost.

    python benchmarks/calibration.py search    # measures every head, writes the configs
    python benchmarks/calibration.py rivals    # turns each rival's knob to the same cost
    python benchmarks/calibration.py quality   # loss and attention time on texts it did not see
    python benchmarks/calibration.py needles   # strict retrieval on prompts it did not see
    python benchmarks/calibration.py report    # tables and JSON of the stages before

Without a stage all. Finished lines are kept: a stopped stage goes on where it was. One thread
by default: attention is then timed by CPU time, which other work on the machine leaves alone.

Rivals: every registered pattern with one knob, turned until the kernels' cost model, on the text of
the search, gives it the cost that the searched config may have. "vertical_slash" is MInference's
(1000, 6096), both numbers cut alike. With the largest budget all rivals run on the first text, with
smaller ones the best three of them; the best one of each budget, and vertical_slash, go on to the
other texts and to the needles.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from calibration_report import report
from mpass.patterns.base import Pattern, find_pattern

from mpass.calibration import run_calibration
from mpass.calibration_check import attend_with, check_input
from mpass.calibration_cost import KernelCost, count_work, read_clock
from mpass.calibration_graph import Operands, attend_dense, estimate_heads
from mpass.calibration_probe import Input, Probe, as_input
from mpass.calibration_report import heatmap
from mpass.calibration_settings import Settings
from mpass.commands.calibrate import retrieval_prompts
from mpass.config import SparseConfig
from mpass.demo import environment
from mpass.evaluate.plan import read_lines
from mpass.evaluate.run import make_sample
from mpass.evaluate.score import strict_score
from mpass.evaluate.tasks import make_haystack
from mpass.models import load_model
from mpass.parse import parse_dtype, parse_pattern
from mpass.texts import find_text, load_tokens

RESULTS = Path(__file__).parent / "results"
BUDGETS = (0.1, 0.15, 0.2, 0.22, 0.25)
SEARCHED = (("alice", 0), ("code", 1 << 17))
"""Texts of the search and where they start, tokens; those of the comparison start at 0."""

COMPARED = (0.15, 0.25)
"""Budgets at which rivals are tuned."""

OBJECTIVES = {"searched": "divergence", "least error": "error", "most recall": "recall"}
"""What the heads are chosen by; all but the first are there to be compared with."""

NEEDLES = ("niah_single_1", "niah_single_2", "passkey")
TUNED_LAYERS = 6
"""Layers on which a rival's cost is looked up, evenly spread."""

BISECTIONS = 9


def knobs(length: int) -> dict[str, Callable[[float], Pattern]]:
    """Per rival the pattern for a knob from 0 (cheapest) to 1 (nearly everything)."""

    def make(name: str, **fields: Callable[[float], Any]) -> Callable[[float], Pattern]:
        cls = find_pattern(name)
        return lambda x: cls(**{field: value(x) for field, value in fields.items()})

    def tokens(x: float) -> int:
        return max(64, int(length * x))

    return {
        "union": make("union", row_share=lambda x: 0.5 * 0.002**x),
        "union, 512 columns": make(
            "union", row_share=lambda x: 0.5 * 0.002**x, columns=lambda x: 512
        ),
        "union by mass": make("union", mass=lambda x: 0.1 + 0.895 * x, row_share=lambda x: 0.1),
        "block_top_p": make("block_top_p", mass=lambda x: 0.05 + 0.945 * x),
        "block_max": make("block_max", share=lambda x: 0.9 * 0.001**x),
        "block_sparse": make("block_sparse", top_k=lambda x: 1 + int(length // 64 * x)),
        "vertical_slash": make(
            "vertical_slash",
            vertical_size=lambda x: max(1, int(1000 * x)),
            slash_size=lambda x: max(1, int(6096 * x)),
        ),
        "a_shape": make("a_shape", window_size=tokens),
        "tri_shape": make("tri_shape", window_size=tokens),
        "strided": make("strided", window_size=tokens),
        "flex_prefill": make("flex_prefill", gamma=lambda x: 0.05 + 0.945 * x),
        "x_attention": make("x_attention", threshold=lambda x: 0.05 + 0.945 * x),
        "sample_attention": make("sample_attention", coverage=lambda x: 0.05 + 0.945 * x),
    }


@dataclass(frozen=True)
class Work:
    """Where the stages keep what they have; every file is made by the stage of its name."""

    folder: Path

    @property
    def state(self) -> Path:
        return self.folder / "state.jsonl"

    @property
    def search(self) -> Path:
        return self.folder / "search.json"

    @property
    def rivals(self) -> Path:
        return self.folder / "rivals.json"

    @property
    def quality(self) -> Path:
        return self.folder / "quality.jsonl"

    @property
    def needles(self) -> Path:
        return self.folder / "needles.jsonl"

    def config(self, name: str, budget: float) -> Path:
        return self.folder / f"{name}-{budget:g}.json"

    def append(self, path: Path, line: dict[str, Any]) -> None:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
        print(json.dumps(line), flush=True)


def search(work: Work, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Measure, choose for every budget, and note what it took."""
    inputs = search_inputs(tokenizer, arguments)
    fresh = not work.state.is_file()
    cpu, wall = time.process_time(), time.perf_counter()

    def announce(step: str, done: int, total: int) -> None:
        print(f"{time.process_time() - cpu:7.0f} s  {step}", flush=True)

    figures = json.loads(work.search.read_text()) if work.search.is_file() else {}
    shares = {}
    wanted = [("searched", budget) for budget in BUDGETS]
    wanted += [(name, max(COMPARED)) for name in OBJECTIVES if name != "searched"]
    for name, budget in wanted:
        settings = Settings(
            budget=budget,
            retrieval_weight=arguments.retrieval_weight,
            objective=OBJECTIVES[name],
        )
        outcome = run_calibration(
            model, inputs, settings=settings, state=work.state, announce=announce
        )
        outcome.config.save(work.config(name, budget))
        work.config(name, budget).with_suffix(".svg").write_text(heatmap(outcome), "utf-8")
        if fresh:
            fresh = False
            figures = {
                "cpu_seconds": time.process_time() - cpu,
                "wall_seconds": time.perf_counter() - wall,
                "peak_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
                "layers_heads_candidates": list(outcome.losses.shape),
                "length": arguments.length,
                "threads": torch.get_num_threads(),
                "dtype": arguments.dtype,
                "versions": environment(),
            }
        shares[f"{name} @ {budget:g}"] = outcome.chosen_seconds / outcome.dense_seconds
        figures |= {"kernel": outcome.kernel.as_dict()}
    figures["shares"] = shares
    work.search.write_text(json.dumps(figures, indent=2) + "\n")


def search_inputs(tokenizer: Any, arguments: argparse.Namespace) -> list[Any]:
    """Two texts, and retrieval prompts, short and long."""
    texts = [
        load_tokens(find_text(text).read(), tokenizer, arguments.length, skip=first)
        for text, first in SEARCHED
    ]
    lengths = [1024, arguments.length // 2]
    return [*texts, *retrieval_prompts(tokenizer, SEARCHED[0][0], lengths, first_seed=1000)]


def tune_rivals(work: Work, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """For the compared budgets {rival: pattern as text}, the dearest one within the budget."""
    kernel = KernelCost(**json.loads(work.search.read_text())["kernel"])
    tokens = search_inputs(tokenizer, arguments)[0]
    kept: list[Operands] = []

    def attend(operands: Operands) -> torch.Tensor:
        kept.append(operands)
        return attend_dense(operands)

    Probe(model).run(tokens, attend)
    step = max(1, len(kept) // TUNED_LAYERS)
    picked = kept[step // 2 :: step]

    def share(pattern: Pattern) -> float:
        spent = 0.0
        for operands in picked:
            start = read_clock(tokens.device)
            index = estimate_heads(operands, [pattern] * operands.num_heads)
            spent += read_clock(tokens.device) - start
            spent += float(kernel.seconds(*count_work(index, operands)).sum())
        return spent / len(picked) / kernel.dense_layer

    tuned: dict[str, dict[str, str]] = {}
    for budget in COMPARED:
        tuned[f"{budget:g}"] = {}
        for name, make in knobs(tokens.shape[1]).items():
            if share(make(0.0)) > budget:
                print(f"{name}: no size of it costs {budget:.0%} or less", flush=True)
                continue
            low, high = 0.0, 1.0
            for _ in range(BISECTIONS):
                middle = (low + high) / 2
                if share(make(middle)) <= budget:
                    low = middle
                else:
                    high = middle
            tuned[f"{budget:g}"][name] = str(make(low))
            print(f"{budget:g} {name}: {make(low)}, {share(make(low)):.1%}", flush=True)
    work.rivals.write_text(json.dumps(tuned, indent=2) + "\n")


def contestants(work: Work) -> dict[str, SparseConfig]:
    """The searched configs and all rivals, by `name @ budget`."""
    found = {
        f"{name} @ {budget:g}": SparseConfig.load(work.config(name, budget))
        for name in OBJECTIVES
        for budget in BUDGETS
        if work.config(name, budget).is_file()
    }
    for budget, rivals in json.loads(work.rivals.read_text()).items():
        for name, text in rivals.items():
            found[f"{name} @ {budget}"] = SparseConfig(parse_pattern(text))
    return found


def quality(work: Work, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Loss, divergence and attention time of every contestant, one line per text and contestant."""
    everyone = contestants(work)
    ours = {name for name in everyone if name.split(" @ ")[0] in OBJECTIVES}
    first, largest = arguments.texts[0], max(COMPARED)
    for text in arguments.texts:
        tokens = load_tokens(find_text(text).read(), tokenizer, arguments.length)
        run = TextRun(work, Probe(model), text, as_input(tokens))
        run(everyone, ours)
        if text == first:
            run(everyone, {f"{name} @ {largest:g}" for name in arguments.rivals} & set(everyone))
            best = {name.split(" @ ")[0] for name in best_rivals(work, first, largest, 3)}
            run(everyone, {f"{name} @ {b:g}" for name in best for b in COMPARED} & set(everyone))
        else:
            run(everyone, {name for b in COMPARED for name in best_rivals(work, first, b, 1)})


class TextRun:
    """The contestants on one text; dense runs once, when it is first needed."""

    def __init__(self, work: Work, probe: Probe, text: str, item: Input) -> None:
        self.work, self.probe, self.text, self.item = work, probe, text, item
        self.exact: torch.Tensor | None = None
        self.done = {line["name"] for line in read_lines(work.quality) if line["text"] == text}

    def __call__(self, everyone: dict[str, SparseConfig], names: set[str]) -> None:
        """Run those of `names` that have no line yet."""
        for name in sorted(names - self.done):
            if self.exact is None:
                self.exact, figures = check_input(self.probe, self.item, None)
                self.note("dense", figures)
            _, figures = check_input(self.probe, self.item, everyone[name], self.exact)
            self.note(name, figures)

    def note(self, name: str, figures: dict[str, float]) -> None:
        if name not in self.done:
            self.work.append(self.work.quality, {"text": self.text, "name": name, **figures})
            self.done.add(name)


def best_rivals(work: Work, text: str, budget: float, count: int) -> set[str]:
    """The rivals of a budget that lose least on a text, and vertical_slash."""
    rivals = [
        line
        for line in read_lines(work.quality)
        if line["text"] == text
        and line["name"].endswith(f" @ {budget:g}")
        and line["name"].split(" @ ")[0] not in OBJECTIVES
    ]
    ranked = [line["name"] for line in sorted(rivals, key=lambda line: line["loss"])]
    return {*ranked[:count], f"vertical_slash @ {budget:g}"}


def needles(work: Work, model: Any, tokenizer: Any, arguments: argparse.Namespace) -> None:
    """Strict retrieval: whether every token of the answer is the most likely one."""
    budgets = arguments.needle_budgets
    names = {f"searched @ {budget:g}" for budget in budgets}
    names |= {name for b in budgets for name in best_rivals(work, arguments.texts[0], b, 1)}
    everyone = contestants(work)
    chosen = {"dense": None, **{name: everyone[name] for name in sorted(names)}}
    content = find_text(arguments.needle_text).read()
    hay = make_haystack(arguments.needle_text, content)
    probe = Probe(model)
    done = {
        (line["task"], line["length"], line["seed"], line["name"])
        for line in read_lines(work.needles)
    }
    for seed in range(arguments.samples):
        for length in (arguments.length // 2, arguments.length):
            for task in NEEDLES:
                sample = make_sample(task, length, seed, None, content, hay, tokenizer)
                for name, config in chosen.items():
                    if (task, length, seed, name) in done:
                        continue
                    attend = attend_dense if config is None else attend_with(config)
                    hidden = probe.run(sample.tokens, attend)
                    score = strict_score(model, hidden[None], sample)
                    line = {"task": task, "length": length, "seed": seed, "name": name}
                    work.append(work.needles, line | {"score": score})


STAGES = {"search": search, "rivals": tune_rivals, "quality": quality, "needles": needles}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("stage", nargs="?", choices=(*STAGES, "report"))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--retrieval-weight", type=float, default=Settings().retrieval_weight)
    parser.add_argument("--texts", nargs="+", default=["paradise", "code"])
    parser.add_argument("--rivals", nargs="+", default=list(knobs(1)), help="those to run")
    parser.add_argument("--needle-text", default="code", help="haystack of niah_single_2")
    parser.add_argument("--needle-budgets", type=float, nargs="+", default=[max(COMPARED)])
    parser.add_argument("--samples", type=int, default=3, help="per needle task and length")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path("calibration"))
    parser.add_argument("--json", type=Path, default=RESULTS / "calibration.json")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    work = Work(arguments.folder)
    work.folder.mkdir(parents=True, exist_ok=True)
    if arguments.stage != "report":
        dtype = parse_dtype(arguments.dtype)
        model, tokenizer = load_model(arguments.model, dtype=dtype, device="cpu")
        for name, stage in STAGES.items():
            if arguments.stage in (None, name):
                stage(work, model, tokenizer, arguments)
    if arguments.stage in (None, "report"):
        figures = json.loads(work.search.read_text())
        figures["rivals"] = json.loads(work.rivals.read_text())
        lines, found = read_lines(work.quality), read_lines(work.needles)
        report(figures, lines, found, arguments.texts, arguments.json)


if __name__ == "__main__":
    main()
