"""Train small Doges on associative recall and on text: full attention, a window, a trained mask.

    OMP_NUM_THREADS=1 python benchmarks/dynamic_mask.py --out benchmarks/results/dynamic_mask.json

The three models have the same sizes, the same first numbers and the same batches. Full attention
sees every key; the window and the trained mask (dynamic mask attention, as transformers' Doge has
it) see `--keep` keys per query: the nearest, or those that the model chooses. Models are compiled
by mpass with gradients, so that the trained mask runs sparse where prompts are longer than it.

Multi-query associative recall: pairs of keys and values, then noise in which some of the keys come
again; the model has to name their values. Training goes from short prompts to long ones. Text: the
bytes of the Python standard library.

After every `--every` steps the state is saved beside the output, and a run that was cut off goes
on there. The curves are drawn to a file of the same name, .svg.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mpass
from mpass.evaluate.charts import Axis, Point, draw_scatter
from mpass.files import write_whole
from mpass.models.texts import find_text

KINDS = ("full", "window", "trained mask")
TASKS = ("recall", "text")
SYMBOLS = 32
"""Keys of associative recall; there are as many values, and twice as many words of noise."""


@dataclass(frozen=True)
class Stage:
    """Prompts of a length for some steps: pairs to recall, and questions about them."""

    length: int
    pairs: int
    questions: int
    steps: int


STAGES = {
    "recall": (Stage(32, 4, 8, 140), Stage(64, 8, 16, 60), Stage(128, 8, 16, 120)),
    "text": (Stage(256, 0, 0, 80),),
}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--keep", type=int, default=32, help="keys that a query sees")
    parser.add_argument("--dim", type=int, default=128, help="two heads")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=4096, help="tokens of a batch")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--every", type=int, default=20, help="steps from evaluation to evaluation")
    parser.add_argument("--held-out", type=int, default=64, help="sequences that are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true", help="only print what the file holds")
    return parser.parse_args()


def doge(options: argparse.Namespace, task: str, kind: str) -> nn.Module:
    """A Doge of one of the kinds, the same numbers for the same seed."""
    torch.manual_seed(options.seed)
    config = transformers.DogeConfig(
        vocab_size=4 * SYMBOLS if task == "recall" else 256,
        hidden_size=options.dim,
        intermediate_size=2 * options.dim,
        num_hidden_layers=options.layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        use_cache=False,
        keep_window_size=options.keep if kind == "trained mask" else 2**20,
        sliding_window=options.keep if kind == "window" else None,
        pad_token_id=0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.DogeForCausalLM(config)


@dataclass(frozen=True)
class Batch:
    """Tokens [B, N], places [B, Q] that are asked about, and what is right there [B, Q]."""

    tokens: Tensor
    places: Tensor
    right: Tensor


def recall_batch(stage: Stage, rows: int, generator: torch.Generator) -> Batch:
    """Pairs at the beginning, then noise with keys in it, at each of which its value is right."""
    keys = torch.rand(rows, SYMBOLS, generator=generator).argsort(1)[:, : stage.pairs]
    values = torch.randint(SYMBOLS, 2 * SYMBOLS, keys.shape, generator=generator)
    size = rows, stage.length
    tokens = torch.randint(2 * SYMBOLS, 4 * SYMBOLS, size, generator=generator)
    tokens[:, : 2 * stage.pairs] = torch.stack([keys, values], 2).flatten(1)
    rest = torch.rand(rows, stage.length - 2 * stage.pairs, generator=generator)
    places = rest.argsort(1)[:, : stage.questions].sort(1).values + 2 * stage.pairs
    asked = torch.randint(stage.pairs, places.shape, generator=generator)
    tokens.scatter_(1, places, keys.gather(1, asked))
    return Batch(tokens, places, values.gather(1, asked))


def text_batch(stage: Stage, rows: int, generator: torch.Generator, held: bool) -> Batch:
    """Sequences of bytes and what follows each; the last tenth of the text is held out."""
    text = torch.frombuffer(bytearray(find_text("code").read().encode()), dtype=torch.uint8)
    border = text.numel() * 9 // 10
    low, high = (border, text.numel()) if held else (0, border)
    starts = torch.randint(low, high - stage.length - 1, (rows, 1), generator=generator)
    tokens = text[starts + torch.arange(stage.length + 1)].long()
    places = torch.arange(stage.length).expand(rows, -1)
    return Batch(tokens[:, :-1], places, tokens[:, 1:])


def make_batch(task: str, stage: Stage, rows: int, seed: int) -> Batch:
    """Seeds of training are not negative; those that are held out are."""
    generator = torch.Generator().manual_seed(seed % 2**31)
    if task == "recall":
        return recall_batch(stage, rows, generator)
    return text_batch(stage, rows, generator, seed < 0)


def loss_and_hits(model: nn.Module, batch: Batch) -> tuple[Tensor, float]:
    """The loss in nats per question, and the share of questions that are answered rightly."""
    hidden = model.model(batch.tokens).last_hidden_state
    hidden = hidden.gather(1, batch.places[:, :, None].expand(-1, -1, hidden.shape[2]))
    logits = model.lm_head(hidden).flatten(0, 1)
    loss = nn.functional.cross_entropy(logits, batch.right.flatten())
    return loss, float((logits.argmax(1) == batch.right.flatten()).float().mean())


def train(
    options: argparse.Namespace, task: str, kind: str, saved: Path, known: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Train and yield what is known after each evaluation; goes on where `saved` was written."""
    torch._dynamo.reset()
    model = doge(options, task, kind)
    plain = model.model
    optimiser = torch.optim.AdamW(
        model.parameters(), lr=options.rate, betas=(0.9, 0.98), weight_decay=0.1
    )
    start = 0
    if known and saved.is_file():
        state = torch.load(saved)
        start = state["step"]
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
    # What fits into the mask is not sparse, and stays as it is; so does the window's dense mask.
    sparse = {"training": "sparse", "min_seq_len": options.keep + 1, "inner_backend": "eager"}
    if kind == "trained mask":
        plain.compile(backend="minference", options=sparse, dynamic=False)
    curve: list[dict[str, float]] = list(known.get("curve", []))
    plan = [stage for stage in STAGES[task] for _ in range(stage.steps)]
    begun, before = time.process_time(), known.get("cpu_seconds", 0.0)
    for step in range(start, len(plan)):
        for group in optimiser.param_groups:  # a short rise, then down to a twentieth
            rise, rest = min(1.0, (step + 1) / 40), 1.0 - step / len(plan)
            group["lr"] = options.rate * rise * (0.05 + 0.95 * rest)
        stage = plan[step]
        batch = make_batch(task, stage, options.tokens // stage.length, options.seed + step)
        loss, _ = loss_and_hits(model, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        if (step + 1) % options.every and step + 1 < len(plan):
            continue
        held = make_batch(task, STAGES[task][-1], options.held_out, -1)
        with torch.no_grad():
            far, share = loss_and_hits(model, held)
        row = {
            "step": step + 1,
            "training": float(loss.detach()),
            "loss": float(far),
            "right": share,
        }
        curve.append({name: round(value, 4) for name, value in row.items()})
        print(f"{task}, {kind}, {json.dumps(curve[-1])}", flush=True)
        state = {"step": step + 1, "model": model.state_dict(), "optimiser": optimiser.state_dict()}
        torch.save(state, saved)
        yield {
            "curve": curve,
            "steps": len(plan),
            "parameters": sum(p.numel() for p in model.parameters()),
            "patterns": sparse_patterns() if kind == "trained mask" else [],
            "cpu_seconds": round(before + time.process_time() - begun, 1),
        }


def sparse_patterns() -> list[str]:
    """What the layers of the latest graphs compute."""
    found = {
        name for each in mpass.reports() for site in each.sparse_sites for name in site.patterns
    }
    return sorted(found)


def table(runs: dict[str, Any]) -> str:
    """The end of every run."""
    lines = ["| task | attention | step | loss | right |", "|---|---|---|---|---|"]
    for name, run in runs.items():
        task, kind = name.split(": ")
        last = run["curve"][-1]
        words = f"{last['step']:g} of {run['steps']} | {last['loss']:.3f} | {last['right']:.3f}"
        lines.append(f"| {task} | {kind} | {words} |")
    return "\n".join(lines)


def chart(runs: dict[str, Any], task: str, value: str) -> str:
    """Curves of one task as SVG: a value by the step."""
    series: dict[str, list[Point]] = {}
    for name, run in runs.items():
        own, kind = name.split(": ")
        if own == task:
            series[kind] = [
                (row["step"], row[value], f"{kind}, step {row['step']:g}: {row[value]:.3f}")
                for row in run["curve"]
            ]
    points = [point for own in series.values() for point in own]
    steps = Axis("step", 0, max(point[0] for point in points))
    if value == "right":
        return draw_scatter("Recall of held-out pairs", series, steps, Axis("share right", 0, 1))
    most, least = max(point[1] for point in points), min(point[1] for point in points)
    axis = Axis("nats per byte", max(0.0, least - 0.1), most + 0.1)
    return draw_scatter("Loss of held-out text", series, steps, axis)


def read_runs(options: argparse.Namespace, about: dict[str, str]) -> dict[str, Any]:
    """What the file holds of these settings; of any where it is only printed."""
    if not options.out.is_file():
        return {}
    old = json.loads(options.out.read_text())
    return dict(old["runs"]) if options.table or old["about"] == about else {}


def main() -> None:
    options = arguments()
    left_out = ("out", "table", "tasks", "kinds")
    about = {name: str(value) for name, value in vars(options).items() if name not in left_out}
    names = [f"{task}: {kind}" for task in options.tasks for kind in options.kinds]
    for name in [] if options.table else names:
        known = read_runs(options, about).get(name, {})
        if known and known["curve"][-1]["step"] == known["steps"]:
            continue
        saved = options.out.with_name(f"{options.out.stem}-{name.replace(': ', '-')}.pt")
        for row in train(options, *name.split(": "), saved, known):
            runs = read_runs(options, about) | {name: row}  # of other processes as well
            held = {"about": about, "runs": {name: runs[name] for name in sorted(runs)}}
            write_whole(options.out, json.dumps(held, indent=1) + "\n")
        saved.unlink()
    runs = read_runs(options, about)
    print(table(runs))
    for task, value in (("recall", "right"), ("text", "loss")):
        if any(name.startswith(task) for name in runs):
            picture = options.out.with_name(f"{options.out.stem}_{task}.svg")
            write_whole(picture, chart(runs, task, value))


if __name__ == "__main__":
    main()
