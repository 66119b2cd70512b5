"""How many needles a cache still answers that was cut to what the end of its prompt attends to.

    python benchmarks/cache_needles.py --model smollm2 --length 4096 --keep 0.5 0.25

Each prompt hides a passkey and ends with the question. It runs once through sparse attention; then
its cache is cut to a share of the keys, and decoding goes on from it: by SnapKV (`snap`), to the
first 4 and the last keys (`recent`), and to random ones and the last 64 (`random`). Prints, per
share and rule, how many of the needles were told, what the cache takes, and CPU seconds per token.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Sequence
from typing import Any

import torch

import mpass
from mpass.evaluate.samples import Sample, fit
from mpass.evaluate.score import loose_score
from mpass.evaluate.tasks import make_haystack, make_puzzle
from mpass.models.load import load_model, parse_dtype
from mpass.models.texts import find_text

TOKENS = 12
"""Tokens that are said of each answer."""


def by_hand(rule: str, length: int, budget: int, like: mpass.KVSelection) -> mpass.KVSelection:
    """A selection of `budget` keys that nobody estimated, the same in every layer and head."""
    if rule == "recent":
        kept = torch.cat([torch.arange(4), torch.arange(length - budget + 4, length)])
    else:
        generator = torch.Generator().manual_seed(0)
        others = torch.randperm(length - 64, generator=generator)[: budget - 64]
        kept = torch.cat([others.sort().values, torch.arange(length - 64, length)])
    shapes = {layer: positions.shape[:2] for layer, positions in like.positions.items()}
    positions = {layer: kept.int().expand(*shape, -1) for layer, shape in shapes.items()}
    return mpass.KVSelection(positions, dict(like.length))


def selected(forward: Any, ids: torch.Tensor) -> tuple[Any, mpass.KVSelection]:
    """The cache of a prompt, and what is selected of it."""
    with mpass.select_keys() as selection:
        cache = forward(ids, use_cache=True, logits_to_keep=1).past_key_values
    return cache, selection


def answer(model: Any, tokenizer: Any, cache: Any, prompt: torch.Tensor) -> tuple[str, float]:
    """What is said after the prompt, and CPU seconds per token."""
    start = time.process_time()
    out = model.generate(
        prompt,
        past_key_values=cache,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=TOKENS,
        do_sample=False,
    )
    seconds = (time.process_time() - start) / TOKENS
    return tokenizer.decode(out[0, prompt.shape[1] :]), seconds


def num_bytes(cache: Any) -> int:
    """What the keys and values of a cache take."""
    return sum(t.numel() * t.element_size() for one in cache.layers for t in (one.keys, one.values))


def compile_for(model: Any, budget: int) -> Any:
    """The model with sparse attention that selects `budget` keys."""
    options = {"kv_select": mpass.SnapKV(budget=budget), "inner_backend": "eager"}
    return torch.compile(model, backend="minference", options=options)


def run(model: Any, tokenizer: Any, samples: Sequence[Sample], keep: Sequence[float]) -> None:
    """Print a line per share and rule."""
    told: dict[tuple[float, str], list[float]] = {}
    sizes: dict[float, int] = {}
    seconds: dict[tuple[float, str], float] = {}
    for sample in samples:
        prompt = sample.tokens[:, : sample.prompt]
        for share in keep:
            budget = int(share * (prompt.shape[1] - 1))
            torch._dynamo.reset()
            cache, selection = selected(compile_for(model, budget), prompt[:, :-1])
            length = prompt.shape[1] - 1
            rules = {
                rule: by_hand(rule, length, budget, selection) for rule in ("recent", "random")
            }
            whole = {} if (1.0, "whole") in told and share != keep[0] else {"whole": None}
            for rule, own in (whole | {"snap": selection} | rules).items():
                cut = copy.deepcopy(cache)
                if own is not None:
                    mpass.compress(cut, own)
                place = (share, rule) if own is not None else (1.0, rule)
                sizes[place[0]] = num_bytes(cut)
                text, seconds[place] = answer(model, tokenizer, cut, prompt)
                told.setdefault(place, []).append(loose_score(text, sample.answers))
                print(f"{place[0]:.0%} {rule}: {text!r} for {sample.answers}", flush=True)
    for place, scores in sorted(told.items(), reverse=True):
        share, rule = place
        print(
            f"{share:5.0%} {rule:8} {sum(scores):.0f} of {len(scores)} needles  "
            f"{sizes[share] / 2**20:.1f} MiB  {seconds[place]:.3f} s per token"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--text", default="essays")
    parser.add_argument("--task", default="passkey")
    parser.add_argument("--length", type=int, default=4096)
    parser.add_argument("--samples", type=int, default=10)
    parser.add_argument("--keep", type=float, nargs="+", default=[0.25])
    given = parser.parse_args()
    torch.set_num_threads(1)
    model, tokenizer = load_model(given.model, dtype=parse_dtype(given.dtype))
    haystack = make_haystack(given.text, find_text(given.text).read())
    samples = [
        fit(make_puzzle(given.task, seed, haystack), tokenizer, given.length)
        for seed in range(given.samples)
    ]
    with torch.no_grad():
        run(model, tokenizer, samples, given.keep)


if __name__ == "__main__":
    main()
