"""Linear layers in 16 and 8 bits, and scores in 8, on the CPU: what a prefill takes and loses.

    python -m benchmarks.linear_cpu --length 8192 --json benchmarks/results/linear_cpu.json

A packaged model reads a text in bf16: dense by Inductor, sparse, and sparse with
`options={"linear": "fp32"}`, `"half"` and `"int8"`, with `options={"attention": "int8"}`, and with
8 bits in both; `--kinds` names some of these. Timed interleaved in one process, medians of CPU
seconds and of wall seconds; the loss is over every position of each text, in nats per token over
dense.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mpass.evaluate.environment import describe_environment
from mpass.evaluate.score import compare_all
from mpass.inspection.text_table import open_console
from mpass.lowering.recorder import record
from mpass.models.load import load_model, parse_dtype
from mpass.models.prefill import compile_body, prefill
from mpass.models.texts import find_text, load_tokens

KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("inductor", {}),
    "sparse": ("minference", {}),
    "sparse, fp32": ("minference", {"linear": "fp32"}),
    "sparse, half": ("minference", {"linear": "half"}),
    "sparse, int8": ("minference", {"linear": "int8"}),
    "sparse, int8 scores": ("minference", {"attention": "int8"}),
    "sparse, both": ("minference", {"linear": "int8", "attention": "int8"}),
}


def measure(settings: argparse.Namespace) -> dict[str, Any]:
    """Seconds of each kind on the first text, and the loss of each kind on every text."""
    model, tokenizer = load_model(settings.model, dtype=parse_dtype(settings.dtype))
    kinds = {name: KINDS[name] for name in ("dense", *settings.kinds)}
    forwards = {name: compile_body(model, *kind) for name, kind in kinds.items()}
    losses: dict[str, dict[str, Any]] = {}
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in kinds}
    density: float | None = None
    for number, text in enumerate(settings.texts):
        tokens = load_tokens(find_text(text).read(), tokenizer, settings.length)
        outputs = {}
        for name, forward in forwards.items():
            print(f"{text}, {name}", file=sys.stderr, flush=True)
            with record() as log:
                outputs[name] = prefill(forward, tokens).last_hidden_state
            if number == 0 and name == "sparse":
                density = log.density()
        others = [outputs[name] for name in settings.kinds]
        found = compare_all(model, outputs["dense"], others, tokens)
        for name, loss in zip(settings.kinds, found, strict=True):
            losses.setdefault(text, {})[name] = {
                "dense": loss.dense,
                "more": loss.sparse - loss.dense,
                "error": loss.error,
            }
        if number:
            continue
        for turn in range(settings.repeats):
            for name, forward in forwards.items():
                cpu, wall = time.process_time(), time.perf_counter()
                prefill(forward, tokens)
                taken = time.process_time() - cpu, time.perf_counter() - wall
                seconds[name].append(taken)
                print(f"{turn + 1}: {name} {taken[0]:.2f} s", file=sys.stderr, flush=True)
    return {
        "model": settings.model,
        "length": settings.length,
        "dtype": settings.dtype,
        "threads": torch.get_num_threads(),
        "environment": describe_environment(),
        "density": density,
        "cpu_seconds": {n: statistics.median(t[0] for t in ts) for n, ts in seconds.items()},
        "wall_seconds": {n: statistics.median(t[1] for t in ts) for n, ts in seconds.items()},
        "losses": losses,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--texts", nargs="+", default=["code"])
    parser.add_argument("--repeats", type=int, default=3)
    every = [name for name in KINDS if name != "dense"]
    parser.add_argument("--kinds", nargs="+", default=every, choices=every)
    parser.add_argument("--json", type=Path, help="write the figures here")
    settings = parser.parse_args()
    result = measure(settings)
    table = Table(
        "", "CPU s", "of dense", "of sparse", *(f"loss, {text}" for text in settings.texts)
    )
    cpu = result["cpu_seconds"]
    for name in ("dense", *settings.kinds):
        losses = [result["losses"][text].get(name) for text in settings.texts]
        table.add_row(
            name,
            f"{cpu[name]:.2f}",
            f"{cpu[name] / cpu['dense']:.2f}",
            f"{cpu[name] / cpu['sparse']:.2f}" if "sparse" in cpu else "",
            *(f"{loss['more']:+.4f} ± {loss['error']:.4f}" if loss else "" for loss in losses),
        )
    open_console().print(table)
    if settings.json:
        settings.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
