"""Caches of one prompt, cut by several rules: what cache_needles.py and cache_questions.py share.

A rule is `whole` (nothing is cut), `snap` (SnapKV, with the numbers given: `snap(window=16,
kernel=21)`; `compact=True` moves the kept keys together, as FINCH does), `recent` (the first 4 and
the last keys) or `random` (random ones and the last 64).
"""

from __future__ import annotations

import ast
import copy
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import torch

import mpass


@dataclass(frozen=True)
class Cut:
    """A share of the keys, and who chooses them.

    text: of the rule as it was given. numbers: of SnapKV. compact: whether kept keys move together.
    """

    share: float
    text: str
    numbers: dict[str, Any] = field(default_factory=dict)
    compact: bool = False

    @property
    def name(self) -> str:
        """Of the rule, without its numbers."""
        return self.text.partition("(")[0]


def parse_cut(share: float, text: str) -> Cut:
    """A share and a rule as text; exits for one that is unknown."""
    name, _, given = text.partition("(")
    if name not in ("whole", "snap", "recent", "random"):
        raise SystemExit(f"unknown rule {text!r}: whole, snap, snap(window=16), recent, random")
    call = ast.parse(f"f({given.removesuffix(')')})", mode="eval").body
    assert isinstance(call, ast.Call)
    numbers = {str(word.arg): ast.literal_eval(word.value) for word in call.keywords}
    compact = numbers.pop("compact", False)
    return Cut(share, text, numbers, compact)


def by_hand(name: str, length: int, budget: int, like: mpass.KVSelection) -> mpass.KVSelection:
    """A selection of `budget` keys that nobody estimated, the same in every layer and head."""
    if name == "recent":
        kept = torch.cat([torch.arange(4), torch.arange(length - budget + 4, length)])
    else:
        generator = torch.Generator().manual_seed(0)
        others = torch.randperm(length - 64, generator=generator)[: budget - 64]
        kept = torch.cat([others.sort().values, torch.arange(length - 64, length)])
    shapes = {layer: positions.shape[:2] for layer, positions in like.positions.items()}
    positions = {layer: kept.int().expand(*shape, -1) for layer, shape in shapes.items()}
    return mpass.KVSelection(positions, dict(like.length))


def compile_for(model: Any, prefill: str) -> Any:
    """The model with an attention that selects, and that is sparse or dense."""
    options: dict[str, Any] = {"kv_select": mpass.SnapKV(), "inner_backend": "eager"}
    if prefill == "dense":
        options["dense_above"] = 1e-9
    return torch.compile(model, backend="minference", options=options)


def cut_caches(
    model: Any, forward: Any, tokens: torch.Tensor, cuts: list[Cut]
) -> Iterator[tuple[Cut, Any]]:
    """Each cut with a cache of its own, of one pass of `forward` over tokens [1, N]."""
    length = tokens.shape[1]
    with ExitStack() as stack:
        heard = [
            stack.enter_context(
                mpass.select_keys(mpass.SnapKV(int(cut.share * length), **cut.numbers))
            )
            for cut in cuts
        ]
        output = forward(tokens, use_cache=True, logits_to_keep=1)
    for cut, selection in zip(cuts, heard, strict=True):
        cache = copy.deepcopy(output.past_key_values)
        if cut.name != "whole":
            own = selection
            if cut.name != "snap":
                own = by_hand(cut.name, length, int(cut.share * length), selection)
            mpass.compress(cache, own, compact=model if cut.compact else None)
        yield cut, cache


def num_bytes(cache: Any) -> int:
    """What the keys and values of a cache take."""
    return sum(t.numel() * t.element_size() for one in cache.layers for t in (one.keys, one.values))
