"""Which signal of an attention tells what a model loses: pairs of (signal, measured loss).

    python -m benchmarks.quality.signals --models smollm2 --texts sympy csv

Each line of the result is one prefill of a text with one setting: the loss over dense (mean, last
quarter, standard error, divergence) and, for each layer and head, what was lost on sampled rows,
computed exactly. A line that is there is not measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.quality.texts import CHOOSING, JUDGING
from mpass.calibration.instrument import (
    AttentionOperands,
    attend_dense,
    attend_index,
    estimate_heads,
)
from mpass.calibration.probe import Probe
from mpass.config.pattern_text import parse_pattern
from mpass.config.promise import pattern_for_loss
from mpass.evaluate.score import compare_all
from mpass.lowering.density import density
from mpass.lowering.exact_rows import sampled_rows
from mpass.lowering.index import BLOCK
from mpass.lowering.reference import attention as reference
from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import load_tokens

ROWS = 64
"""Query rows of a layer that are looked at."""

GRID = [0.072, 0.036, 0.018, 0.0127, 0.009, 0.0064, 0.0045, 0.0032, 0.0016, 0.0008]


def rows_of(operands: AttentionOperands) -> Tensor:
    """Some rows, spread over the prompt."""
    return sampled_rows(operands.query.shape[2], 0, ROWS, ROWS, operands.query.device)


def exact(
    operands: AttentionOperands, rows: Tensor, chunk: int = 16
) -> Iterator[tuple[Tensor, Tensor, int]]:
    """Yields (rows, weights fp32 [B,H,r,Nv], values [B,H,Nv,Dv]) a few rows at a time."""
    heads = operands.num_heads
    for part in rows.split(chunk):
        seen = int(part[-1]) + operands.mask.query_offset + 1
        keys = reference.repeat_kv(operands.key[:, :, :seen].float(), heads)
        scores = operands.query[:, :, part].float() @ keys.mT * operands.scale
        allowed = reference.allowed_cells(
            operands.mask, part + operands.mask.query_offset, operands.key.shape[2]
        )[..., :seen]
        yield part, reference.masked_softmax(scores, allowed, operands.sinks), seen


def pilot(operands: AttentionOperands) -> dict[str, Any]:
    """Of exact rows: what is lost if blocks below each share of GRID go, by the row alone."""
    heads = operands.num_heads
    lost = torch.zeros(len(GRID), heads)
    error = torch.zeros(len(GRID), heads)
    norm = torch.zeros(heads)
    margin = torch.zeros(len(GRID), heads)
    rows = rows_of(operands)
    for part, weights, seen in exact(operands, rows):
        blocks = -(-seen // BLOCK)
        pad = blocks * BLOCK - seen
        weights = torch.nn.functional.pad(weights, (0, pad)).unflatten(-1, (blocks, BLOCK))
        values = torch.nn.functional.pad(operands.value[:, :, :seen].float(), (0, 0, 0, pad))
        values = reference.repeat_kv(values, heads).unflatten(2, (blocks, BLOCK))
        mass = weights.sum(-1)[0]  # [H, r, J]
        parts = torch.einsum("hrjk,hjkd->hrjd", weights[0], values[0])
        out = parts.sum(2)
        norm += out.square().sum((1, 2))
        j = torch.arange(blocks)
        own = (part + operands.mask.query_offset)[:, None] // BLOCK
        forced = (j == 0) | (own - j < 2)
        for i, share in enumerate(GRID):
            kept = (mass >= share) | forced
            held = (mass * kept).sum(-1)
            lost[i] += (1 - held).sum(-1)
            if i % 3 == 2:  # dear: every third will do
                mine = torch.einsum("hrj,hrjd->hrd", kept.float(), parts)
                mine = mine / held.clamp(min=1e-9)[..., None]
                error[i] += (mine - out).square().sum((1, 2))
            margin[i] += (mass * ~kept).amax(-1).sum(-1)
    n = len(rows)
    return {
        "pilot_lost": (lost / n).tolist(),
        "pilot_error": (error / n).tolist(),
        "norm": (norm / n).tolist(),
        "pilot_margin": (margin / n).tolist(),
    }


def meter(operands: AttentionOperands, index: Any, out: Tensor) -> dict[str, Any]:
    """Of exact rows: lost mass and squared output error of what was computed, per head."""
    heads = operands.num_heads
    rows = rows_of(operands)
    lost, error, norm = torch.zeros(heads), torch.zeros(heads), torch.zeros(heads)
    value_lost = torch.zeros(heads)
    columns = reference.selected_columns(index, 1, operands.key.shape[2])
    for part, weights, seen in exact(operands, rows):
        values = reference.repeat_kv(operands.value[:, :, :seen].float(), heads)
        truth = (weights @ values)[0]
        own = (part + operands.mask.query_offset) // BLOCK
        first = operands.mask.query_offset // BLOCK
        count = -(-seen // BLOCK)
        chosen = reference.selected_blocks(index, own - first, own, count, stop=int(own[-1]) + 1)[0]
        keys = torch.arange(seen)
        visible = chosen[..., keys // BLOCK] | (
            columns[0, :, None, :seen] & (keys < own[:, None] * BLOCK)
        )
        gone = weights[0] * ~visible
        lost += gone.sum((1, 2))
        norms = values[0].norm(dim=-1)
        value_lost += torch.einsum("hrk,hk->h", gone, norms)
        error += (out[0, :, part].float() - truth).square().sum((1, 2))
        norm += truth.square().sum((1, 2))
    n = len(rows)
    return {
        "lost": (lost / n).tolist(),
        "error": (error / n).tolist(),
        "value_lost": (value_lost / n).tolist(),
        "norm": (norm / n).tolist(),
    }


def rounded(value: Any) -> Any:
    """Numbers in nested lists with four digits."""
    if isinstance(value, list):
        return [rounded(v) for v in value]
    return float(f"{value:.4g}")


class Collector:
    """A model that is run on texts, dense and sparse, with every attention looked into."""

    def __init__(self, name: str, length: int, scored: int | None, pilot: bool = True) -> None:
        self.name, self.length, self.scored, self.pilot = name, length, scored, pilot
        self.model, self.tokenizer = load_model(name, dtype=parse_dtype("bf16"))
        self.probe = Probe(self.model)

    def tokens(self, text: str, skip: int = 0) -> Tensor:
        """A window of a text of benchmarks.quality.texts."""
        return load_tokens({**CHOOSING, **JUDGING}[text](), self.tokenizer, self.length, skip)

    def dense(self, tokens: Tensor) -> tuple[Tensor, dict[int, Any]]:
        """Hidden states of a dense prefill, and what single rows say of each layer beforehand."""
        layers: dict[int, Any] = {}

        def attend(operands: AttentionOperands) -> Tensor:
            if self.pilot and operands.mask.window == 0:
                layers[operands.layer] = pilot(operands)
            return attend_dense(operands)

        return self.probe.run(tokens, attend), layers

    def sparse(self, tokens: Tensor, setting: str) -> tuple[Tensor, dict[int, Any]]:
        """Hidden states of a prefill with one pattern, and what the meter says of each layer."""
        pattern = parse_pattern(setting)
        layers: dict[int, Any] = {}

        def attend(operands: AttentionOperands) -> Tensor:
            if operands.mask.window:
                return attend_dense(operands)
            index = estimate_heads(operands, [pattern] * operands.num_heads)
            out = attend_index(operands, index)
            sizes = {"batch": 1, "num_queries": self.length, "num_keys": self.length}
            found = meter(operands, index, out)
            found["density"] = density(index, operands.mask, **sizes)[0].tolist()
            layers[operands.layer] = found
            return out

        return self.probe.run(tokens, attend), layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=["smollm2"])
    parser.add_argument("--texts", nargs="+", default=[*CHOOSING, *JUDGING])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--scored", type=int, default=2048)
    parser.add_argument("--skip", type=int, default=0)
    parser.add_argument("--no-pilot", action="store_true", help="leave the dense lines out")
    parser.add_argument("--settings", nargs="*", default=["union", "union(row_share=0.006)"])
    parser.add_argument("--max-loss", nargs="*", type=float, default=[], help="of the option")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    arguments.settings += [pattern_for_loss(loss).in_words() for loss in arguments.max_loss]
    torch.set_num_threads(1)
    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    known = {
        (r["model"], r["text"], r["length"], r["skip"], r["setting"])
        for r in map(json.loads, lines)
    }
    for name in arguments.models:
        collector = Collector(name, arguments.length, arguments.scored, not arguments.no_pilot)
        for text in arguments.texts:
            key = (name, text, arguments.length, arguments.skip)
            todo = [s for s in ["dense", *arguments.settings] if (*key, s) not in known]
            if not [s for s in todo if s != "dense"]:
                continue
            start = time.process_time()
            tokens = collector.tokens(text, arguments.skip)
            exact_hidden, layers = collector.dense(tokens)
            print(text, f"dense {time.process_time() - start:.0f} CPU s", flush=True)
            results = []
            if "dense" in todo and collector.pilot:
                results.append(("dense", exact_hidden, layers))
            for setting in todo:
                if setting == "dense":
                    continue
                hidden, layers = collector.sparse(tokens, setting)
                results.append((setting, hidden, layers))
                print(text, setting, f"{time.process_time() - start:.0f} CPU s", flush=True)
            losses = compare_all(
                collector.model,
                exact_hidden[None],
                [h[None] for _, h, _ in results],
                tokens,
                scored=collector.scored,
            )
            with arguments.out.open("a") as file:
                for (setting, _, layers), loss in zip(results, losses, strict=True):
                    line = dict(zip(("model", "text", "length", "skip"), key, strict=True))
                    line |= {
                        "setting": setting,
                        "loss": loss.sparse - loss.dense,
                        "error": loss.error,
                        "last": loss.sparse_quarters[-1] - loss.dense_quarters[-1],
                        "last_error": loss.last_error,
                        "quarters": [
                            a - b
                            for a, b in zip(loss.sparse_quarters, loss.dense_quarters, strict=True)
                        ],
                        "divergence": loss.divergence,
                        "dense": loss.dense,
                    }
                    shares = [v for found in layers.values() for v in found.get("density", [])]
                    line["density"] = sum(shares) / max(1, len(shares))
                    line["layers"] = {
                        k: {n: rounded(v) for n, v in found.items()} for k, found in layers.items()
                    }
                    file.write(json.dumps(line) + "\n")
                    print(
                        text,
                        setting,
                        f"{line['loss']:+.4f} ±{line['error']:.4f}",
                        f"last {line['last']:+.4f}",
                        f"kl {line['divergence']:.4f}",
                        f"density {line['density']:.3f}",
                        flush=True,
                    )
            print(text, f"{time.process_time() - start:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
