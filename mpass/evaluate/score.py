"""Scores of a prefill: strict retrieval, loss by position, distance to the dense predictions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.evaluate.samples import Sample
from mpass.prefill import CHUNK, logits

QUARTERS = 4


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


@dataclass(frozen=True)
class Losses:
    """A text's prediction by two prefills. Nats per token, mean over the text's positions.

    dense, sparse: negative log likelihood; dense_quarters, sparse_quarters: the same by quarter of
    the text; divergence: Kullback-Leibler, of the sparse from the dense distribution; agreement:
    share of positions with the same most likely token.
    """

    dense: float
    sparse: float
    dense_quarters: tuple[float, ...]
    sparse_quarters: tuple[float, ...]
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
    quarters = {
        name: tuple(float(part.mean()) for part in values.tensor_split(QUARTERS))
        for name, values in whole.items()
    }
    return Losses(
        dense=float(whole["dense"].mean()),
        sparse=float(whole["sparse"].mean()),
        dense_quarters=quarters["dense"],
        sparse_quarters=quarters["sparse"],
        divergence=float(torch.cat(divergences).mean()),
        agreement=float(torch.cat(same).double().mean()),
    )
