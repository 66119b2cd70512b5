"""What patterns keep of a real model's prompts, head by head: densities.json, which is committed.

    python -m benchmarks.gpu.densities

Prefills of SmolLM2-135M over long texts, on a CPU. The benchmark gives its random lists these
densities, since heads differ by more than an order of magnitude and the slowest ones decide.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mpass.lowering.density import density
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.models.load import load_model
from mpass.models.texts import TEXTS, find_text, load_tokens
from mpass.patterns.base import find_pattern

PATH = Path(__file__).parent / "densities.json"
MODEL = "smollm2"
LENGTHS = (2048, 4096, 8192)
PATTERNS = ("vertical_slash", "block_sparse", "block_max", "block_top_p", "union")

Rows = dict[tuple[str, int], tuple[list[float], list[float]]]


def recorded() -> list[str]:
    """Patterns in list form whose densities were recorded."""
    patterns = json.loads(PATH.read_text())["patterns"] if PATH.is_file() else {}
    return [
        name for name, lengths in patterns.items() if "adjacent" in next(iter(lengths.values()))
    ]


def load_densities(pattern: str, length: int, heads: int) -> tuple[float, ...]:
    """Densities of `heads` heads, spread over those of the model; of the nearest length recorded.

    Density falls with length, so that beyond the longest prompt recorded it is an upper bound.
    """
    lengths = json.loads(PATH.read_text())["patterns"][pattern]
    nearest = min(lengths, key=lambda recorded: abs(int(recorded) - length))
    ordered = lengths[nearest]["densities"]
    return tuple(ordered[(2 * i + 1) * len(ordered) // (2 * heads)] for i in range(heads))


class Attentions(TorchFunctionMode):
    """Shows `see` the query and key of every scaled_dot_product_attention."""

    def __init__(self, see: Callable[[torch.Tensor, torch.Tensor], None]) -> None:
        super().__init__()
        self.see = see

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.see(args[0], args[1])
        return func(*args, **(kwargs or {}))


def prefill_rows(model: Any, tokens: torch.Tensor, lengths: Sequence[int]) -> Rows:
    """Per pattern and length, of the heads of all layers: the density, and `adjacent_share`.

    One dense prefill serves all lengths: a prompt's start has the queries and keys that it would
    have alone.
    """
    rows: Rows = defaultdict(lambda: ([], []))

    def see(query: torch.Tensor, key: torch.Tensor) -> None:
        scale, heads = query.shape[-1] ** -0.5, range(query.shape[1])
        for name, length in itertools.product(PATTERNS, lengths):
            pattern = find_pattern(name)()
            prefix = query[:, :, :length], key[:, :, :length]
            inputs = EstimateInputs(*prefix, AttentionMask(), heads, scale)
            index = type(pattern).estimate(inputs, [pattern] * len(heads))
            shares, adjacent = rows[name, length]
            sizes = {"batch": 1, "num_queries": length, "num_keys": length}
            shares += density(index, AttentionMask(), **sizes)[0].tolist()
            adjacent += adjacent_share(index)

    with torch.no_grad(), Attentions(see):
        model(tokens, use_cache=False, logits_to_keep=1)
    return rows


def adjacent_share(index: SparseIndex) -> list[float]:
    """Per list: the share of its entries that follow the entry before them, block by block."""
    places = torch.arange(1, max(1, index.block_index.shape[-1]))
    live = places < index.block_count[..., None]
    follows = (index.block_index.diff(dim=-1) == 1) & live
    shares: list[float] = (follows.sum((2, 3)) / live.sum((2, 3)).clamp(min=1))[0].tolist()
    return shares


def main() -> None:
    """Record every pattern at every length, averaged over the texts."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--texts", nargs="*", default=list(TEXTS))
    parser.add_argument("--lengths", type=int, nargs="*", default=list(LENGTHS))
    parser.add_argument("--out", type=Path, default=PATH)
    options = parser.parse_args()
    model, tokenizer = load_model(MODEL, dtype=torch.float32)
    texts = [find_text(name).read() for name in options.texts]
    runs = []
    for text in texts:
        tokens = load_tokens(text, tokenizer, max(options.lengths))
        runs.append(prefill_rows(model, tokens, options.lengths))
    patterns: dict[str, dict[str, Any]] = {name: {} for name in PATTERNS}
    for name, length in itertools.product(PATTERNS, options.lengths):
        shares, adjacent = zip(*(run[name, length] for run in runs), strict=True)
        means = [statistics.fmean(heads) for heads in zip(*shares, strict=True)]
        row: dict[str, Any] = {"mean": round(statistics.fmean(means), 4)}
        if any(adjacent):
            row["adjacent"] = round(statistics.fmean(itertools.chain(*adjacent)), 4)
        row["densities"] = sorted(round(share, 4) for share in means)
        patterns[name][str(length)] = row
        print(name, length, row["mean"], row.get("adjacent", ""), flush=True)
    about = {
        "model": MODEL,
        "texts": {name: find_text(name).title for name in options.texts},
        "parameters": {name: str(find_pattern(name)()) for name in PATTERNS},
        "densities": "share of the causal cells computed, per head of all layers, ascending",
        "adjacent": "share of the listed blocks that follow the one before, block by block",
    }
    options.out.write_text(json.dumps({"about": about, "patterns": patterns}) + "\n")


if __name__ == "__main__":
    main()
