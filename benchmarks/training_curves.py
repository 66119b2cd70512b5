"""Train one small model twice, through sparse and through dense attention, and compare the losses.

    python benchmarks/training_curves.py --out benchmarks/results/training_curves.json

A byte-level Llama learns the Python standard library: both runs start from the same numbers and see
the same batches. Every `--every` steps both are evaluated densely on text that none was trained on.
The file is written after each evaluation; a run that was cut off is begun anew, one that was
finished is kept. `--table` prints what the file holds.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

import mpass
from mpass.lowering.recorder import record
from mpass.models.texts import find_text

RUNS = ("dense", "sparse")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--length", type=int, default=2048, help="bytes of a sequence")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--dim", type=int, default=128, help="two heads over one kv head")
    parser.add_argument("--pattern", default="block_sparse(5)")
    parser.add_argument("--every", type=int, default=25, help="steps from evaluation to evaluation")
    parser.add_argument("--held-out", type=int, default=8, help="sequences that are evaluated")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--table", action="store_true")
    return parser.parse_args()


def small_llama(options: argparse.Namespace) -> nn.Module:
    """A Llama over bytes, the same numbers for the same seed."""
    torch.manual_seed(options.seed)
    config = transformers.LlamaConfig(
        vocab_size=256,
        hidden_size=options.dim,
        intermediate_size=3 * options.dim,
        num_hidden_layers=options.layers,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=options.length,
        use_cache=False,
    )
    return transformers.LlamaForCausalLM(config)


def sequences(options: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Sequences to train on, in an order that the seed decides, and others, held out."""
    text = torch.frombuffer(bytearray(find_text("code").read().encode()), dtype=torch.uint8)
    rows = text[: text.numel() // options.length * options.length].view(-1, options.length).long()
    held = rows[:: len(rows) // options.held_out][: options.held_out]
    kept = torch.ones(len(rows), dtype=torch.bool)
    kept[:: len(rows) // options.held_out] = False
    order = torch.randperm(int(kept.sum()), generator=torch.Generator().manual_seed(options.seed))
    return rows[kept][order], held


def evaluated(model: nn.Module, held: Tensor) -> float:
    """Mean loss in nats per byte of held-out sequences, by dense attention."""
    with torch.no_grad():
        return sum(float(model(row[None], labels=row[None]).loss) for row in held) / len(held)


def train(options: argparse.Namespace, kind: str) -> Iterator[dict[str, Any]]:
    """Train and yield what is known after each evaluation: losses by step, and seconds of CPU."""
    torch._dynamo.reset()
    model = small_llama(options)
    rows, held = sequences(options)
    backend = {"dense": {"backend": "inductor"}}.get(
        kind,
        {
            "backend": "minference",
            "options": {
                "training": "sparse",
                "pattern": options.pattern,
                "min_seq_len": 1,
                "dense_above": 1.0,
            },
        },
    )
    step = torch.compile(model, **backend)
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    losses: list[float] = []
    checked: dict[int, float] = {0: evaluated(model, held)}
    density, start = 1.0, time.process_time()
    for number in range(options.steps):
        for group in optimiser.param_groups:  # a short rise, then down to a tenth
            rise, rest = min(1.0, (number + 1) / 20), 1.0 - number / options.steps
            group["lr"] = 2e-3 * rise * (0.1 + 0.9 * rest)
        row = rows[number % len(rows)][None]
        with record() as log:
            loss = step(row, labels=row).loss
        if log.calls:
            density = sum(float(call.density.mean()) for call in log.calls) / len(log.calls)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad()
        losses.append(round(float(loss.detach()), 4))
        if (number + 1) % options.every == 0:
            checked[number + 1] = evaluated(model, held)
            print(
                f"{kind} {number + 1}: {losses[-1]:.3f}, held out {checked[number + 1]:.4f}",
                flush=True,
            )
            sites = mpass.last_report().sparse_sites if kind == "sparse" else []
            yield {
                "losses": losses,
                "held_out": {str(at): round(value, 4) for at, value in checked.items()},
                "density": round(density, 4),
                "sparse_sites": len(sites),
                "cpu_seconds": round(time.process_time() - start, 1),
            }


def table(rows: dict[str, Any]) -> str:
    """Held-out losses of both runs, and their difference."""
    lines = ["| step | " + " | ".join(RUNS) + " | difference |", "|---|---|---|---|"]
    for step in rows[RUNS[0]]["held_out"]:
        dense, sparse = (rows[name]["held_out"].get(step) for name in RUNS)
        if dense is not None and sparse is not None:
            lines.append(f"| {step} | {dense:.4f} | {sparse:.4f} | {sparse - dense:+.4f} |")
    return "\n".join(lines)


def main() -> None:
    options = arguments()
    about = {key: str(value) for key, value in vars(options).items() if key not in ("out", "table")}
    rows: dict[str, Any] = {}
    if options.out.is_file():
        old = json.loads(options.out.read_text())
        rows = old["runs"] if options.table or old["about"] == about else {}
    if not options.table:
        for kind in RUNS:
            if len(rows.get(kind, {}).get("losses", [])) == options.steps:
                continue
            for row in train(options, kind):
                rows[kind] = row
                options.out.write_text(json.dumps({"about": about, "runs": rows}) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
