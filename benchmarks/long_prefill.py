"""The memory and the time of a very long prompt that comes in chunks, on the CPU.

    python -m benchmarks.long_prefill --model gemma3 --length 32768
    python -m benchmarks.long_prefill --shape gemma3 --length 131072   # weights at random
    python -m benchmarks.long_prefill --model gemma3 --length 32768 --backend inductor

A model in bf16, compiled, reads a prompt over a DynamicCache, a chunk at a time, as `generate` does
with `prefill_chunk_size`. Printed are, up to every eighth of the prompt: the bytes of its keys and
values, counted; the most memory that the process held during those chunks, less what it held before
the first; what is left of that without the keys and values, which shall not grow with the prompt
but for what is a few numbers per token; and CPU and wall seconds. The first chunks compile. With
`--model` the text is read and its loss told, of 64 positions per chunk.

Linux keeps the most memory of a process and forgets it on demand (/proc/self/clear_refs).
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table
from torch import Tensor

from mpass.evaluate.environment import describe_environment
from mpass.inspection.text_table import open_console
from mpass.lowering.recorder import record
from mpass.models.load import load_config, load_model
from mpass.models.prefill import compile_body, logits
from mpass.models.texts import find_text, load_tokens

SCORED = 64
"""Positions per chunk whose loss is taken."""

PARTS = 8
"""Of the prompt, at whose ends memory is told."""


@dataclass(frozen=True)
class Part:
    """An eighth of a prompt. Bytes; seconds of this part alone.

    tokens: up to its end; cache: keys and values; peak: the most memory that the process held in
    the part, less what it held before the first chunk; density: share of the cells that sparse
    attentions over the whole cache computed, None if there was none.
    """

    tokens: int
    cache: int
    peak: int
    cpu_seconds: float
    wall_seconds: float
    density: float | None
    nats_per_token: float | None


def held(field: str) -> int:
    """Bytes that /proc/self/status tells: VmRSS, or VmHWM for the most since it was forgotten."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


def forget_peak() -> None:
    """Let VmHWM begin again at what is held now."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")


def cache_bytes(cache: Any) -> int:
    """Of the keys and values of a DynamicCache, whose sliding layers hold their window alone."""
    return sum(
        tensor.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


def made_model(name: str, length: int) -> Any:
    """A model of another one's shape with weights at random, in bf16, for `length` positions."""
    import transformers

    config = load_config(name, dtype=torch.bfloat16)
    config.max_position_embeddings = max(length, config.max_position_embeddings)
    torch.manual_seed(0)
    return transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


@torch.no_grad()
def nats_of_chunk(model: Any, hidden: Tensor, tokens: Tensor, start: int) -> list[float]:
    """The losses of some positions of a chunk [1, n, hidden] that begins at `start`."""
    count = min(hidden.shape[1], tokens.shape[1] - 1 - start)
    chosen = torch.arange(0, count, max(1, count // SCORED))
    scores = logits(model, hidden[0, chosen]).log_softmax(-1)
    return (-scores.gather(-1, tokens[0, start + chosen + 1, None])[:, 0]).tolist()


@torch.no_grad()
def read(
    model: Any, forward: Any, tokens: Tensor, chunk: int, *, judged: bool
) -> tuple[list[Part], int]:
    """The parts of a prompt [1, N], and what the process held before; judged: whether to score."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    length, parts, losses = tokens.shape[1], list[Part](), list[float]()
    chunks = list(zip(tokens.split(chunk, 1), range(0, length, chunk), strict=True))
    ends = {(number + 1) * len(chunks) // PARTS for number in range(PARTS)}
    forget_peak()
    before = held("VmRSS")
    cpu, wall = time.process_time(), time.perf_counter()
    densities: list[float] = []
    for number, (part, start) in enumerate(chunks, start=1):
        with record() as log:
            out = forward(input_ids=part, past_key_values=cache, use_cache=True)
        longest = max((call.num_keys for call in log.calls), default=0)
        found = [float(call.density.mean()) for call in log.calls if call.num_keys == longest]
        densities += found  # of whole attention: sliding windows have fewer keys after a chunk
        if judged:
            losses += nats_of_chunk(model, out.last_hidden_state, tokens, start)
        del out
        if number not in ends:
            continue
        parts.append(
            Part(
                tokens=start + part.shape[1],
                cache=cache_bytes(cache),
                peak=held("VmHWM") - before,
                cpu_seconds=time.process_time() - cpu,
                wall_seconds=time.perf_counter() - wall,
                density=sum(densities) / len(densities) if densities else None,
                nats_per_token=sum(losses) / len(losses) if losses else None,
            )
        )
        print(parts[-1], flush=True)
        densities.clear()
        losses.clear()
        forget_peak()
        cpu, wall = time.process_time(), time.perf_counter()
    return parts, before


def table_of(parts: Sequence[Part], title: str) -> Table:
    """A row per part."""
    table = Table(title=title)
    for name in ("tokens", "KV", "peak", "peak less KV", "CPU s", "wall s", "density", "nats"):
        table.add_column(name, justify="right")
    for part in parts:
        table.add_row(
            str(part.tokens),
            *(f"{number / 1e6:.0f} MB" for number in (part.cache, part.peak)),
            f"{(part.peak - part.cache) / 1e6:.0f} MB",
            f"{part.cpu_seconds:.1f}",
            f"{part.wall_seconds:.1f}",
            "-" if part.density is None else f"{part.density:.1%}",
            "-" if part.nats_per_token is None else f"{part.nats_per_token:.4f}",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", help="a model to read a text with")
    parser.add_argument("--shape", help="a model whose shape to take, with weights at random")
    parser.add_argument("--length", type=int, default=32768)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--text", default="code")
    parser.add_argument("--backend", default="minference")
    parser.add_argument("--json", type=Path, help="add the run to the list in this file")
    settings = parser.parse_args()
    if (settings.model is None) == (settings.shape is None):
        parser.error("either --model or --shape")
    if settings.model:
        model, tokenizer = load_model(settings.model, dtype=torch.bfloat16)
        tokens = load_tokens(find_text(settings.text).read(), tokenizer, settings.length)
    else:
        model = made_model(settings.shape, settings.length)
        generator = torch.Generator().manual_seed(0)
        vocabulary = model.config.vocab_size
        tokens = torch.randint(3, vocabulary, (1, settings.length), generator=generator)
    forward = compile_body(model, settings.backend)
    parts, before = read(model, forward, tokens, settings.chunk, judged=settings.model is not None)
    name = settings.model or f"{settings.shape}, weights at random"
    title = f"{name}, {settings.backend}, chunks of {settings.chunk}; {before / 1e9:.2f} GB before"
    open_console().print(table_of(parts, title))
    if settings.json:
        kept = json.loads(settings.json.read_text()) if settings.json.exists() else []
        run = {
            "model": Path(settings.model or settings.shape).name,
            "random": settings.model is None,
            "backend": settings.backend,
            "length": settings.length,
            "chunk": settings.chunk,
            "text": settings.text if settings.model else None,
            "threads": torch.get_num_threads(),
            "environment": describe_environment(),
            "held_before": before,
            "parts": [asdict(part) for part in parts],
        }
        settings.json.write_text(json.dumps([*kept, run], indent=1) + "\n")


if __name__ == "__main__":
    main()
