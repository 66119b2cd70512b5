"""Scores of a prefill: strict retrieval, loss by position, distance to the dense predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.evaluate.samples import Sample
from mpass.prefill import CHUNK, logits

QUARTERS = 4
POSITIONS = 16
"""Parts of a text of which losses are given: a curve by position."""


@torch.no_grad()
def strict_score(model: Any, hidden: Tensor, sample: Sample) -> float:
    """Share of the answers whose every token is the most likely one, given those before it.

    hidden: last hidden states [1, N, hidden] of the sample's tokens.
    """
    found = 0
    for start, stop in sample.spans:
        top = logits(model, hidden[0, start - 1 : stop - 1]).argmax(-1)
        found += bool(torch.equal(top, sample.tokens[0, start:stop].to(top.device)))
    return found / len(sample.spans)


def loose_score(generated: str, answers: tuple[str, ...]) -> float:
    """Share of the answers that stand somewhere in a text, upper and lower case alike.

    RULER's own score (`string_match_all`). After a sparse prefill it hides damage: dense decoding
    finds what the prefill lost.
    """
    text = generated.lower()
    return sum(answer.lower() in text for answer in answers) / len(answers)


@dataclass(frozen=True)
class Losses:
    """A text's prediction by two prefills. Nats per token, mean over the text's positions.

    dense, sparse: negative log likelihood; *_quarters, *_positions: the same by quarter and by
    sixteenth of the text; divergence: Kullback-Leibler, of the sparse from the dense distribution;
    agreement: share of positions with the same most likely token.
    """

    dense: float
    sparse: float
    dense_quarters: tuple[float, ...]
    sparse_quarters: tuple[float, ...]
    dense_positions: tuple[float, ...]
    sparse_positions: tuple[float, ...]
    divergence: float
    agreement: float


@torch.no_grad()
def compare_losses(model: Any, dense: Tensor, sparse: Tensor, tokens: Tensor) -> Losses:
    """Compare last hidden states [1, N, hidden] of two prefills of a text [1, N] in chunks."""
    losses: dict[str, list[Tensor]] = {"dense": [], "sparse": []}
    divergences, same = [], []
    for start in range(0, tokens.shape[1] - 1, CHUNK):
        following = tokens[0, start + 1 : start + 1 + CHUNK, None]
        scores = {}
        for name, hidden in (("dense", dense), ("sparse", sparse)):
            rows = hidden[0, start : start + len(following)]
            scores[name] = logits(model, rows).log_softmax(-1)
            losses[name].append(-scores[name].gather(-1, following)[:, 0].double())
        gap = scores["dense"] - scores["sparse"]
        divergences.append((scores["dense"].exp() * gap).sum(-1).double())
        same.append(scores["dense"].argmax(-1) == scores["sparse"].argmax(-1))
    whole = {name: torch.cat(values) for name, values in losses.items()}
    return Losses(
        dense=float(whole["dense"].mean()),
        sparse=float(whole["sparse"].mean()),
        dense_quarters=means_of_parts(whole["dense"], QUARTERS),
        sparse_quarters=means_of_parts(whole["sparse"], QUARTERS),
        dense_positions=means_of_parts(whole["dense"], POSITIONS),
        sparse_positions=means_of_parts(whole["sparse"], POSITIONS),
        divergence=float(torch.cat(divergences).mean()),
        agreement=float(torch.cat(same).double().mean()),
    )


def means_of_parts(values: Tensor, count: int) -> tuple[float, ...]:
    """Mean of each of `count` equal parts of [N] in order; of fewer parts if N is less."""
    return tuple(float(part.mean()) for part in values.tensor_split(min(count, len(values))))
