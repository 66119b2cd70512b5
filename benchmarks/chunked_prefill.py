"""What a prompt in chunks costs and loses beside the same prompt at once.

    python benchmarks/chunked_prefill.py --model smollm2 --model gemma3 --chunk 512 --chunk 2048

Packaged models read a text over a cache: dense, sparse at once, and sparse in chunks. Their layers
run as transformers runs them, but for their attention, which is `mpass.attend` with the default
pattern, or torch's SDPA for the dense run. Prints one table: the CPU seconds of all attentions (of
one thread, so that other programs on the machine change little; the ways take turns, and the
quickest run of each counts), their ratio to those of the whole prompt, and the loss of the text
over the dense one, in nats per token. Attention with a sliding window is timed with the rest.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

import mpass
from mpass.models.load import DTYPES, load_model
from mpass.models.prefill import predict
from mpass.models.texts import find_text, load_tokens
from mpass.options import DEFAULT_MIN_SEQ_LEN

DENSE = "dense"
LEAST_QUERIES = 128
"""Shorter chunks are dense in compiled models as well."""


class TimedAttention:
    """The attention of all layers, and the CPU seconds of it since `seconds` was set to 0."""

    def __init__(self, pattern: str) -> None:
        self.pattern = pattern
        self.seconds = 0.0
        self.sparse = 0

    def __call__(
        self,
        module: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **_ignored: Any,
    ) -> tuple[Tensor, None]:
        """query [B, H, Nq, D], key and value [B, Hk, Nk, D]; the result is [B, Nq, H, D]."""
        started = time.process_time()
        wanted = key.shape[2] >= DEFAULT_MIN_SEQ_LEN and query.shape[2] >= LEAST_QUERIES
        if self.pattern == DENSE or not wanted:
            out = self.dense(query, key, value, scaling, sliding_window)
        else:
            self.sparse += 1
            out = mpass.attend(
                query,
                key,
                value,
                patterns=self.pattern,
                query_offset=key.shape[2] - query.shape[2],
                scale=scaling,
                window=sliding_window or 0,
                layer=module.layer_idx,
            )
        self.seconds += time.process_time() - started
        return out.transpose(1, 2), None

    @staticmethod
    def dense(
        query: Tensor, key: Tensor, value: Tensor, scale: float | None, window: int | None
    ) -> Tensor:
        """Exact attention by torch: by its causal kernel where that serves, else under a mask."""
        queries, keys = query.shape[2], key.shape[2]
        if queries == keys and (window is None or keys <= window):
            return functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scale, enable_gqa=True
            )
        at = torch.arange(keys - queries, keys)[:, None]
        seen = torch.arange(keys) <= at
        if window is not None:
            seen &= torch.arange(keys) > at - window
        return functional.scaled_dot_product_attention(
            query, key, value, attn_mask=seen, scale=scale, enable_gqa=True
        )


@torch.no_grad()
def read(model: Any, tokens: Tensor, chunk: int, attention: TimedAttention) -> dict[str, float]:
    """The loss of a text [1, N] that is read in chunks, and the CPU seconds of its attention."""
    from transformers import AttentionInterface, DynamicCache

    AttentionInterface.register("timed", attention)
    model.set_attn_implementation("timed")
    cache = DynamicCache()
    hidden = [
        model.get_decoder()(
            input_ids=part,
            past_key_values=cache,
            attention_mask=whole_mask(model),
            use_cache=True,
        ).last_hidden_state
        for part in tokens.split(chunk, dim=1)
    ]
    predictions = predict(model, torch.cat(hidden, 1), tokens)
    return {
        "attention_seconds": attention.seconds,
        "nats_per_token": -float(predictions.log_likelihood.double().mean()),
        "sparse_attentions": attention.sparse,
    }


def whole_mask(model: Any) -> Any:
    """No mask for any kind of layer: the attention above knows its own."""
    kinds = getattr(model.config, "layer_types", None)
    return dict.fromkeys(kinds, None) if kinds and len(set(kinds)) > 1 else None


def measure(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """What each way of reading the text costs and how it predicts, by the name of the way."""
    model, tokenizer = load_model(name, dtype=DTYPES[arguments.dtype])
    text = find_text(arguments.text)
    tokens = load_tokens(text.read(), tokenizer, arguments.length, arguments.skip)
    warm = TimedAttention(arguments.pattern)
    read(model, tokens[:, : 2 * DEFAULT_MIN_SEQ_LEN], DEFAULT_MIN_SEQ_LEN, warm)  # builds kernels
    found = {"dense": read(model, tokens, arguments.length, TimedAttention(DENSE))}
    ways = {"whole": arguments.length} | {f"chunks of {size}": size for size in arguments.chunk}
    for _ in range(arguments.repeats):
        for way, chunk in ways.items():
            run = read(model, tokens, chunk, TimedAttention(arguments.pattern))
            seconds = found.get(way, run)["attention_seconds"]
            found[way] = run | {"attention_seconds": min(seconds, run["attention_seconds"])}
    return found


def rows(name: str, found: dict[str, dict[str, float]]) -> list[str]:
    """The rows of a model in the table."""
    whole, dense = found["whole"]["attention_seconds"], found["dense"]["nats_per_token"]
    lines = []
    for way, run in found.items():
        seconds, lost = run["attention_seconds"], run["nats_per_token"] - dense
        told = f"{lost:+.4f}" if way != DENSE else ""
        lines.append(f"| {name} | {way} | {seconds:.2f} | {seconds / whole:.2f} | {told} |")
    return lines


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", action="append", help="smollm2 and gemma3 if not given")
    parser.add_argument("--length", type=int, default=10240)
    parser.add_argument("--chunk", type=int, action="append", help="512 and 2048 if not given")
    parser.add_argument("--text", default="code")
    parser.add_argument("--skip", type=int, default=0, help="tokens of the text to leave out")
    parser.add_argument("--repeats", type=int, default=2, help="runs, of which the quickest counts")
    parser.add_argument("--pattern", default="union")
    parser.add_argument("--dtype", default="fp32", choices=sorted(DTYPES))
    parser.add_argument("--json", type=Path, help="add a line per model to this file")
    arguments = parser.parse_args()
    arguments.chunk = arguments.chunk or [512, 2048]
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"
    print("| model | prompt | CPU s of attention | of the whole prompt's | nats per token |")
    print("|---|---|---|---|---|")
    for name in arguments.model or ["smollm2", "gemma3"]:
        found = measure(name, arguments)
        print("\n".join(rows(name, found)), flush=True)
        if arguments.json:
            kept = {"length", "text", "skip", "repeats", "pattern", "dtype"}
            settings = {key: value for key, value in vars(arguments).items() if key in kept}
            with arguments.json.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"model": name, **settings, **found}) + "\n")


if __name__ == "__main__":
    main()
