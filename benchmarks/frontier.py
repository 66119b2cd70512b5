"""Density against loss: every registered pattern over its parameters, on real models and texts.

    python benchmarks/frontier.py --models smollm2 --texts code alice essays --lengths 8192

Each line of the result is one prefill through the public backend, all full-attention layers sparse:
the density really computed, the seconds of estimation and attention, and the loss over dense on the
same tokens. Dense attention runs once per model, text and length, and is a line of its own.
Measured lines are not measured again, so that a run can be stopped, started and widened.
`--show` measures nothing: it draws what is there, a picture per model and length, and lists the
settings that cost least, by their worst text. Seconds want a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from mpass.lowering.record import record
from mpass.patterns.base import registered_patterns
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mpass.demo import environment
from mpass.evaluate.plan import DENSE, read_lines
from mpass.evaluate.plots import Point, density_against_loss
from mpass.evaluate.runner import mean_density, sparse_options
from mpass.evaluate.score import compare_losses
from mpass.evaluate.summary import LARGEST_LOSS
from mpass.models import load_model
from mpass.parse import parse_dtype
from mpass.prefill import compile_body, prefill
from mpass.profiling import outermost_ops
from mpass.texts import find_text, load_tokens

RESULTS = Path(__file__).parent / "results" / "frontier.jsonl"
WARM_UP = 1024
"""Tokens of a first prefill, in which kernels are compiled."""


def settings(name: str, length: int) -> list[str]:
    """A pattern over its parameters; fixed budgets are shares of the length."""
    tokens = [length // 32, length // 16, length // 8, length // 4]
    blocks = [max(4, length // 64 // part) for part in (20, 10, 5, 3)]
    ranges = {
        "a_shape": [f"a_shape(128, {2 * size})" for size in tokens],
        "block_max": [f"block_max(share={x})" for x in (0.03, 0.1, 0.2, 0.4)],
        "block_sparse": [f"block_sparse({top_k})" for top_k in blocks],
        "block_top_p": [f"block_top_p(mass={x})" for x in (0.6, 0.8, 0.9, 0.95)],
        "flex_prefill": [f"flex_prefill(gamma={x})" for x in (0.8, 0.9, 0.95, 0.98)],
        "sample_attention": [f"sample_attention(coverage={x})" for x in (0.8, 0.9, 0.95, 0.98)],
        "strided": [f"strided(64, {size}, {size})" for size in tokens],
        "tri_shape": [f"tri_shape(8, {2 * size})" for size in tokens],
        "union": [
            "union(mass=0.5, row_share=0.06)",
            "union(row_share=0.03)",
            "union",
            "union(mass=0.6, row_share=0.02, rows=32)",
            "union(mass=0.8, row_share=0.01)",
        ],
        "vertical_slash": [f"vertical_slash({size}, {size})" for size in tokens],
        "x_attention": [f"x_attention(threshold={x})" for x in (0.6, 0.8, 0.9, 0.95)],
    }
    return ranges.get(name, [name])


def list_patterns(names: list[str] | None, length: int) -> Iterator[str]:
    """Settings of all patterns in turn: a stopped run has some of every pattern."""
    known = [name for name in registered_patterns() if name != DENSE and name in (names or [name])]
    columns = [settings(name, length) for name in known]
    for step in range(max(map(len, columns), default=0)):
        yield from (column[step] for column in columns if step < len(column))


def measure(model: Any, forward: Any, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Last hidden states of a prefill, and its density and seconds.

    Seconds are those of the process, so that other processes' turns on the cores are left out; the
    profiler's share of them goes to estimation and to attention.
    """
    start, tokens = tokens[:, :WARM_UP].clone(), tokens.clone()
    for prompt in (start, tokens):  # one graph for both
        torch._dynamo.mark_dynamic(prompt, 1)
    prefill(forward, start)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler:
        wall, busy = time.perf_counter(), time.process_time()
        with record() as log:
            hidden = prefill(forward, tokens).last_hidden_state
        wall, busy = time.perf_counter() - wall, time.process_time() - busy
    scale = busy / torch.get_num_threads() / wall
    index = attention = 0.0
    for name, seconds in outermost_ops(profiler.events(), cuda=False):
        if name.startswith("minference::") and name != "minference::sparse_attention":
            index += seconds * scale
        else:
            attention += seconds * scale
    return hidden, {
        "density": mean_density(model, log.calls),
        "rewritten_layers": len(log.calls),
        "prefill_seconds": wall * scale,
        "index_seconds": index,
        "attention_seconds": attention,
        "estimation_share": index / (index + attention),
    }


def run(arguments: argparse.Namespace) -> None:
    """Measure what the output lacks."""
    dtype = parse_dtype(arguments.dtype)
    done = {
        tuple(line[key] for key in ("model", "dtype", "text", "length", "pattern"))
        for line in read_lines(arguments.output)
    }
    for name in arguments.models:
        model = tokenizer = None
        for length in arguments.lengths:
            for text in arguments.texts:
                wanted = [DENSE, *list_patterns(arguments.patterns, length)]
                key = (name, arguments.dtype, text, length)
                missing = [pattern for pattern in wanted if (*key, pattern) not in done]
                if not missing:
                    continue
                if model is None:
                    model, tokenizer = load_model(name, dtype=dtype)
                tokens = load_tokens(find_text(text).read(), tokenizer, length)
                for line in measure_text(model, tokens, missing):
                    keys = dict(zip(("model", "dtype", "text", "length"), key, strict=True))
                    with arguments.output.open("a", encoding="utf-8") as file:
                        file.write(json.dumps(keys | line | {"versions": environment()}) + "\n")
                    print(key, line["pattern"], f"density {line['density']:.3f}", flush=True)


def measure_text(model: Any, tokens: Tensor, patterns: list[str]) -> Iterator[dict[str, Any]]:
    """A line for each pattern, dense first."""
    torch._dynamo.reset()
    forward = compile_body(model, "eager")
    dense, seconds = measure(model, forward, tokens)
    for pattern in patterns:
        hidden, figures = dense, seconds
        if pattern != DENSE:
            torch._dynamo.reset()
            # Dense fallbacks off: the curve shows the pattern itself.
            options = sparse_options(model, pattern) | {
                "min_seq_len": 0,
                "dense_above": 1.0,
                "inner_backend": "eager",
            }
            forward = compile_body(model, "minference", options)
            hidden, figures = measure(model, forward, tokens)
        losses = dataclasses.asdict(compare_losses(model, dense, hidden, tokens))
        yield {"pattern": pattern} | figures | losses


@dataclasses.dataclass(frozen=True)
class Setting:
    """A pattern over all texts of a model and length.

    loss, last_quarter: of the worst text; cost: seconds of estimation and attention as a share of
    dense attention's on the same texts.
    """

    pattern: str
    texts: int
    density: float
    estimation_share: float
    cost: float
    loss: float
    last_quarter: float

    @property
    def gate(self) -> bool:
        return max(self.loss, self.last_quarter) <= LARGEST_LOSS


def settings_of(lines: list[dict[str, Any]]) -> list[Setting]:
    """The settings in the lines of one model and length, the cheapest first."""
    dense = {line["text"]: line["attention_seconds"] for line in lines if line["pattern"] == DENSE}
    groups: dict[str, list[dict[str, Any]]] = {}
    for line in lines:
        if line["pattern"] != DENSE:
            groups.setdefault(line["pattern"], []).append(line)
    found = []
    for pattern, group in groups.items():
        seconds = sum(line["index_seconds"] + line["attention_seconds"] for line in group)
        found.append(
            Setting(
                pattern=pattern,
                texts=len(group),
                density=statistics.fmean(line["density"] for line in group),
                estimation_share=statistics.fmean(line["estimation_share"] for line in group),
                cost=seconds / sum(dense[line["text"]] for line in group),
                loss=max(line["sparse"] - line["dense"] for line in group),
                last_quarter=max(
                    line["sparse_quarters"][-1] - line["dense_quarters"][-1] for line in group
                ),
            )
        )
    return sorted(found, key=lambda setting: setting.cost)


def render(lines: list[dict[str, Any]], title: str) -> Table:
    """A row per setting, the cheapest first; the loss gate of a default in the last column."""
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for name in ("pattern", "texts", "density", "cost", "index", "loss", "last 1/4", "gate"):
        table.add_column(name, overflow="fold")
    for item in settings_of(lines):
        table.add_row(
            item.pattern,
            str(item.texts),
            f"{item.density:.1%}",
            f"{item.cost:.1%}",
            f"{item.estimation_share:.0%}",
            f"{item.loss:+.4f}",
            f"{item.last_quarter:+.4f}",
            "yes" if item.gate else "",
        )
    return table


def draw(lines: list[dict[str, Any]], title: str) -> str:
    """Density against loss, a line per pattern."""
    series: dict[str, list[Point]] = {}
    for item in settings_of(lines):
        words = f"{item.pattern}: {item.density:.1%}, {item.loss:+.4f}, cost {item.cost:.1%}"
        name = item.pattern.split("(")[0]
        series.setdefault(name, []).append((item.density, item.loss, words))
    return density_against_loss(title, dict(sorted(series.items())))


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--texts", nargs="+", default=["code", "alice", "essays"])
    parser.add_argument("--lengths", nargs="+", type=int, default=[8192])
    parser.add_argument("--patterns", nargs="+", help="names; all registered ones if not given")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--show", action="store_true", help="show the output, measure nothing")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if not arguments.show:
        torch.set_num_threads(arguments.threads)
        run(arguments)
    lines = read_lines(arguments.output)
    for model, length in sorted({(line["model"], line["length"]) for line in lines}):
        group = [line for line in lines if (line["model"], line["length"]) == (model, length)]
        Console().print(render(group, f"{model}, {length} tokens"))
        picture = arguments.output.with_name(f"{arguments.output.stem}_{model}_{length}.svg")
        picture.write_text(draw(group, f"{model}, {length} tokens: worst text"), "utf-8")


if __name__ == "__main__":
    main()
