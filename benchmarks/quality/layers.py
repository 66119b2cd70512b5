"""What attention that some layers lose does to a model, and what a layer loses with each share.

    python -m benchmarks.quality.layers --models smollm2 gemma3 --texts sympy csv --out FILE

Each line of the result is a group of neighbouring layers on one text: `curves`, of each layer as it
is in dense attention, what each promise of `options={"max_loss": ...}` would compute and lose there
(mean over heads: cells, softmax mass, squared error of the output over its square), and
`divergence`, of the model's predictions where these layers alone are sparse with the promise
DISTURBANCE. Groups, since the divergence by one layer drowns in what rounding to bf16 makes of any
change. A line that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.signals import exact, rows_of
from benchmarks.quality.texts import CHOOSING, JUDGING
from mpass.calibration.instrument import (
    AttentionOperands,
    attend_dense,
    attend_index,
    estimate_heads,
)
from mpass.calibration.probe import Probe
from mpass.config.promise import pattern_for_loss
from mpass.evaluate.score import compare_all
from mpass.lowering.density import density
from mpass.lowering.index import BLOCK, SparseIndex
from mpass.lowering.reference import attention as reference
from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import load_tokens
from mpass.patterns.base import Pattern

PROMISES = (0.001, 0.0017, 0.003, 0.0055, 0.01, 0.017, 0.03, 0.055, 0.1)

DISTURBANCE = 0.1


def seen_by(index: SparseIndex, operands: AttentionOperands, rows: Tensor, seen: int) -> Tensor:
    """Which of the first `seen` keys an index computes for some rows: bool [H, R, seen]."""
    own = (rows + operands.mask.query_offset) // BLOCK
    first = operands.mask.query_offset // BLOCK
    count = -(-seen // BLOCK)
    chosen = reference.selected_blocks(index, own - first, own, count, stop=int(own[-1]) + 1)[0]
    keys = torch.arange(seen)
    columns = reference.selected_columns(index, 1, operands.key.shape[2])[0, :, None, :seen]
    return chosen[..., keys // BLOCK] | (columns & (keys < own[:, None] * BLOCK))


def curve(operands: AttentionOperands, patterns: list[Pattern]) -> dict[str, list[float]]:
    """Cells, lost mass and relative squared error of a layer with each pattern, mean over heads."""
    indexes = [estimate_heads(operands, [p] * operands.num_heads) for p in patterns]
    lost, error = torch.zeros(len(indexes)), torch.zeros(len(indexes))
    norm, rows = 0.0, rows_of(operands)
    for part, weights, seen in exact(operands, rows):
        values = reference.repeat_kv(operands.value[:, :, :seen].float(), operands.num_heads)[0]
        truth = weights[0] @ values
        norm += float(truth.square().sum())
        for i, index in enumerate(indexes):
            kept = weights[0] * seen_by(index, operands, part, seen)
            held = kept.sum(-1, keepdim=True)
            lost[i] += (1 - held).sum()
            error[i] += (kept @ values / held.clamp(min=1e-9) - truth).square().sum()
    sizes = {"batch": 1, "num_queries": operands.query.shape[2], "num_keys": operands.key.shape[2]}
    return {
        "density": [float(density(i, operands.mask, **sizes).mean()) for i in indexes],
        "lost": (lost / (len(rows) * operands.num_heads)).tolist(),
        "error": (error / norm).tolist(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--texts", nargs="+", default=[*CHOOSING])
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--scored", type=int, default=512)
    parser.add_argument("--groups", type=int, default=6, help="of layers; 0 for the curves alone")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    known = {
        (r["model"], r["text"], r["length"], tuple(r["layers"])) for r in map(json.loads, lines)
    }
    for name in arguments.models:
        model, tokenizer = load_model(name, dtype=parse_dtype("bf16"))
        probe = Probe(model)
        for text in arguments.texts:
            tokens = load_tokens({**CHOOSING, **JUDGING}[text](), tokenizer, arguments.length, 0)
            measure(probe, tokens, (name, text, arguments.length), known, arguments)


def measure(
    probe: Probe, tokens: Tensor, key: tuple[Any, ...], known: set[Any], arguments: Any
) -> None:
    """Write the lines of one text that are not there."""
    start = time.process_time()
    patterns: list[Pattern] = [pattern_for_loss(loss) for loss in PROMISES]
    disturbance = pattern_for_loss(DISTURBANCE)
    curves: dict[int, dict[str, list[float]]] = {}

    def look(operands: AttentionOperands) -> Tensor:
        if operands.mask.window == 0:
            curves[operands.layer] = curve(operands, patterns)
        return attend_dense(operands)

    dense = probe.run(tokens, look)
    print(*key, f"curves {time.process_time() - start:.0f} CPU s", flush=True)
    count = min(len(curves), arguments.groups or 1)
    for group in torch.tensor(sorted(curves)).tensor_split(count):
        layers = group.tolist()
        if (*key, tuple(layers)) in known:
            continue
        line: dict[str, Any] = dict(zip(("model", "text", "length"), key, strict=True))
        line |= {"layers": layers, "of": max(curves) + 1, "curves": [curves[n] for n in layers]}
        if arguments.groups:

            def attend(operands: AttentionOperands, layers: list[int] = layers) -> Tensor:
                if operands.layer not in layers:
                    return attend_dense(operands)
                index = estimate_heads(operands, [disturbance] * operands.num_heads)
                return attend_index(operands, index)

            hidden = probe.run(tokens, attend)
            (loss,) = compare_all(
                probe.model, dense[None], [hidden[None]], tokens, scored=arguments.scored
            )
            line |= {"divergence": loss.divergence, "loss": loss.sparse - loss.dense}
            print(
                *key,
                layers,
                f"kl {loss.divergence:.5f}",
                f"{time.process_time() - start:.0f} CPU s",
                flush=True,
            )
        with arguments.out.open("a") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
