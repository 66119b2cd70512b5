"""Scores of a prefill: strict retrieval, loss by position, distance to the dense predictions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.evaluate.samples import Sample
from mpass.models.prefill import CHUNK, logits

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
    """A text's prediction by two prefills. Nats per token, mean over the scored positions.

    dense, sparse: negative log likelihood; *_quarters, *_positions: the same by quarter and by
    sixteenth of the text; error, last_error: standard errors of sparse - dense over the text and
    over its last quarter, from the differences at single positions; divergence: Kullback-Leibler,
    of the sparse from the dense distribution; agreement: share of positions with the same most
    likely token; scored: how many positions.
    """

    dense: float
    sparse: float
    dense_quarters: tuple[float, ...]
    sparse_quarters: tuple[float, ...]
    dense_positions: tuple[float, ...]
    sparse_positions: tuple[float, ...]
    error: float
    last_error: float
    divergence: float
    agreement: float
    scored: int


def compare_losses(model: Any, dense: Tensor, sparse: Tensor, tokens: Tensor) -> Losses:
    """Compare last hidden states [1, N, hidden] of two prefills of a text [1, N]."""
    return compare_all(model, dense, [sparse], tokens)[0]


@torch.no_grad()
def compare_all(
    model: Any,
    dense: Tensor,
    sparse: Sequence[Tensor],
    tokens: Tensor,
    scored: int | None = None,
) -> list[Losses]:
    """`compare_losses` of several prefills with the same dense one, a chunk of logits at a time.

    scored: positions that are looked at, evenly spread over the text; all if None. Logits are most
    of the work where the vocabulary is large.
    """
    known: list[Tensor] = []
    others: list[list[Tensor]] = [[] for _ in sparse]
    for positions in spread_positions(tokens.shape[1] - 1, scored).split(CHUNK):
        following = tokens[0, positions + 1, None]
        expected = logits(model, dense[0, positions]).log_softmax(-1)
        known.append(expected.gather(-1, following)[:, 0].double())
        top, weight = expected.argmax(-1), expected.exp()
        for hidden, rows in zip(sparse, others, strict=True):
            scores = logits(model, hidden[0, positions]).log_softmax(-1)
            own = scores.gather(-1, following)[:, 0]
            same = scores.argmax(-1) == top
            divergence = torch.linalg.vecdot(weight, expected - scores)
            rows.append(torch.stack([own.double(), divergence.double(), same.double()]))
    return [losses_of(-torch.cat(known), torch.cat(rows, 1)) for rows in others]


def losses_of(dense: Tensor, sparse: Tensor) -> Losses:
    """Means of what was found at single positions, fp64.

    dense [n]: negative log likelihood; sparse [3, n]: log likelihood, divergence, agreement.
    """
    likelihood, divergence, same = sparse
    difference = -likelihood - dense
    return Losses(
        dense=float(dense.mean()),
        sparse=float(-likelihood.mean()),
        dense_quarters=means_of_parts(dense, QUARTERS),
        sparse_quarters=means_of_parts(-likelihood, QUARTERS),
        dense_positions=means_of_parts(dense, POSITIONS),
        sparse_positions=means_of_parts(-likelihood, POSITIONS),
        error=standard_error(difference),
        last_error=standard_error(difference.tensor_split(QUARTERS)[-1]),
        divergence=float(divergence.mean()),
        agreement=float(same.mean()),
        scored=len(difference),
    )


def spread_positions(length: int, count: int | None) -> Tensor:
    """`count` of the positions 0 ... length - 1, evenly spread, ascending; all if None or more."""
    if count is None or count >= length:
        return torch.arange(length)
    return torch.arange(count) * length // count


def standard_error(values: Tensor) -> float:
    """Of the mean of independent values [N]; 0 for one value."""
    return float(values.std(correction=0) / len(values) ** 0.5)


def means_of_parts(values: Tensor, count: int) -> tuple[float, ...]:
    """Mean of each of `count` equal parts of [N] in order; of fewer parts if N is less."""
    return tuple(float(part.mean()) for part in values.tensor_split(min(count, len(values))))
