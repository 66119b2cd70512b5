"""What a model loses under a promise when a prompt comes whole, in chunks, in turns, or padded.

    python -m benchmarks.quality.parts --texts latex --length 4096 --max-loss 0.01 --out FILE

Every way runs through the backend, with guard and fallback to dense attention, and is held against
dense attention over the whole text: `chunks N` are N tokens at a time over one cache; `turns` are
three parts, one half and two quarters, as turns of a conversation or a cached prefix have them;
`padded` is the second row of a batch whose first row is twice as long (its text is the first half,
and its loss is that of these tokens); `half` is that text alone. Density is the share of the causal
cells that were computed, over all layers, dense calls included. A line that is there is not
measured again.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import mpass
from benchmarks.quality.texts import CHOOSING, JUDGING
from mpass.evaluate.score import compare_all
from mpass.lowering.recorder import Log
from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import load_tokens

Forward = Callable[..., Any]


def in_parts(forward: Forward, tokens: Tensor, sizes: list[int]) -> Tensor:
    """Hidden states [N, hidden] of a prompt [1, N] that comes in parts of these sizes."""
    cache, found = None, []
    for part in tokens.split(sizes, 1):
        out = forward(input_ids=part, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        found.append(out.last_hidden_state[0])
    return torch.cat(found)


def padded(forward: Forward, tokens: Tensor) -> Tensor:
    """Hidden states of the first half of a text, beside the whole text in a left-padded batch."""
    half = tokens.shape[1] // 2
    batch = tokens.repeat(2, 1)
    batch[1] = batch[1].roll(half)
    mask = torch.ones_like(batch)
    mask[1, : tokens.shape[1] - half] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    out = forward(input_ids=batch, attention_mask=mask, position_ids=positions, use_cache=True)
    hidden: Tensor = out.last_hidden_state[1, -half:]
    return hidden


def ways(length: int) -> dict[str, Callable[[Forward, Tensor], Tensor]]:
    """How a prompt comes, by name."""

    def chunks(size: int) -> Callable[[Forward, Tensor], Tensor]:
        return lambda forward, tokens: in_parts(forward, tokens, [size] * (length // size))

    quarter = length // 4
    return {
        "whole": chunks(length),
        "chunks 512": chunks(512),
        "chunks 2048": chunks(2048),
        "turns": lambda f, tokens: in_parts(f, tokens, [2 * quarter, quarter, quarter]),
        "half": lambda f, tokens: in_parts(f, tokens[:, : length // 2], [length // 2]),
        "padded": padded,
    }


def cells(log: Log, layers: int) -> float:
    """The share of the causal cells that was computed, of the last row of a batch.

    layers: of the model. What is not in the log, as chunks over few keys, was dense.
    """
    length = max((call.num_keys for call in log.calls), default=1)
    left_out = sum(
        call.num_queries
        * (call.num_keys - call.num_queries / 2)
        * float(1 - call.density[-1].mean())
        for call in log.calls
    )
    return 1 - left_out / (layers * length**2 / 2)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--texts", nargs="+", default=[*JUDGING])
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--scored", type=int, default=1024)
    parser.add_argument("--max-loss", type=float, default=0.01)
    parser.add_argument("--ways", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    length, name = arguments.length, arguments.model
    lines = arguments.out.read_text().splitlines() if arguments.out.is_file() else []
    fields = ("model", "text", "length", "max_loss", "way")
    known = {tuple(r[field] for field in fields) for r in map(json.loads, lines)}
    model, tokenizer = load_model(name, dtype=parse_dtype("bf16"))
    body = model.get_decoder()
    for text in arguments.texts:
        key = (name, text, length, arguments.max_loss)
        chosen = arguments.ways or list(ways(length))
        chosen = [way for way in chosen if (*key, way) not in known]
        if not chosen:
            continue
        tokens = load_tokens({**CHOOSING, **JUDGING}[text](), tokenizer, length, 0)
        dense = body(input_ids=tokens, use_cache=True).last_hidden_state[0]
        for way in chosen:
            start = time.process_time()
            torch._dynamo.reset()
            options = {"max_loss": arguments.max_loss, "inner_backend": "eager"}
            forward = torch.compile(body.forward, backend="minference", options=options)
            with mpass.record() as log:
                hidden = ways(length)[way](forward, tokens)
            part = tokens[:, : len(hidden)]
            (loss,) = compare_all(
                model, dense[None, : len(hidden)], [hidden[None]], part, scored=arguments.scored
            )
            line = dict(zip(fields, (*key, way), strict=True))
            line |= {
                "density": cells(log, model.config.num_hidden_layers),
                "sparse_calls": sum(call.lowering != "dense" for call in log.calls),
                "calls": len(log.calls),
                "loss": loss.sparse - loss.dense,
                "error": loss.error,
                "last": loss.sparse_quarters[-1] - loss.dense_quarters[-1],
                "last_error": loss.last_error,
                "divergence": loss.divergence,
            }
            rounded = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in line.items()}
            with arguments.out.open("a") as file:
                file.write(json.dumps(rounded) + "\n")
            print(rounded, f"{time.process_time() - start:.0f} CPU s", flush=True)


if __name__ == "__main__":
    main()
