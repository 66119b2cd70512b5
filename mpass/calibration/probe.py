"""Running a model for a calibration, and what a change in its attention does to its predictions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.calibration.instrument import Attend, Instrument
from mpass.errors import CalibrationError
from mpass.models.prefill import CHUNK, logits, prefill

TEXT_STRIDE = 4
"""Of a text every so many positions are compared: logits cost as much as a few layers."""


@dataclass(frozen=True, eq=False)
class Input:
    """One prompt [1, N] and the positions (int64 [R]) whose next-token predictions count.

    kind: "text" (all positions alike) or "retrieval" (those that predict an answer's tokens).
    """

    tokens: Tensor
    rows: Tensor
    kind: str

    @property
    def length(self) -> int:
        return self.tokens.shape[1]


def as_input(value: Any) -> Input:
    """An Input from tokens [1, N] or [N], or from a retrieval sample (tokens and answer spans)."""
    if isinstance(value, Input):
        return value
    if isinstance(value, Tensor):
        tokens = value[None] if value.ndim == 1 else value
        if (
            tokens.ndim != 2
            or len(tokens) != 1
            or tokens.shape[1] < 2
            or tokens.is_floating_point()
        ):
            shape = tuple(value.shape)
            raise CalibrationError(f"an input is {shape} of {value.dtype}; give token ids [1, N]")
        return Input(tokens, torch.arange(tokens.shape[1] - 1), "text")
    if hasattr(value, "tokens") and hasattr(value, "spans"):
        rows = [p - 1 for start, stop in value.spans for p in range(start, stop)]
        return Input(value.tokens, torch.tensor(rows), "retrieval")
    raise CalibrationError(f"an input is a {type(value).__name__}; give token ids [1, N]")


class Probe:
    """A model whose attentions go through a function of ours.

    A causal language model of transformers is run as its body, logits are made for the positions
    looked at; any other module must return logits [1, N, V] for tokens [1, N].
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.split = all(hasattr(model, n) for n in ("get_decoder", "get_output_embeddings"))
        forward: Callable[..., Any] = model.get_decoder().forward if self.split else model
        self.instrument = Instrument(forward)
        parameter = next(iter(model.parameters()), torch.zeros(()))
        self.device = parameter.device

    def run(self, tokens: Tensor, attend: Attend) -> Tensor:
        """Hidden states (or logits) [N, ...] of a prompt, with this attention."""
        self.instrument.attend = attend
        tokens = tokens.to(self.device)
        if self.split:
            hidden: Tensor = prefill(self.instrument, tokens).last_hidden_state[0]
            return hidden
        out = self.instrument(tokens)
        found: Tensor = getattr(out, "logits", out)[0]
        return found

    def scores(self, out: Tensor, rows: Tensor) -> Tensor:
        """Log-probabilities of all tokens at some positions: fp32 [R, V]."""
        picked = out[rows.to(out.device)]
        return (logits(self.model, picked) if self.split else picked.float()).log_softmax(-1)

    @torch.no_grad()
    def divergence(self, exact: Tensor, sparse: Tensor, item: Input) -> float:
        """Kullback-Leibler divergence from the exact predictions, nats per position looked at."""
        rows = item.rows[::TEXT_STRIDE] if item.kind == "text" else item.rows
        total = 0.0
        for chunk in rows.split(CHUNK):
            left, right = self.scores(exact, chunk), self.scores(sparse, chunk)
            total += float((left.exp() * (left - right)).sum(-1).double().sum())
        return total / len(rows)

    def loss(self, out: Tensor, item: Input) -> float:
        """Negative log-likelihood of the tokens that follow the positions that count, mean."""
        return float(self.losses(out, item).mean())

    @torch.no_grad()
    def losses(self, out: Tensor, item: Input) -> Tensor:
        """Negative log-likelihood of each token that follows a position that counts: fp64 [R]."""
        parts = []
        following = item.tokens[0].to(out.device)
        for chunk in item.rows.split(CHUNK):
            picked = following[chunk.to(out.device) + 1]
            parts.append(-self.scores(out, chunk).gather(-1, picked[:, None])[:, 0].double())
        return torch.cat(parts)

    @torch.no_grad()
    def found(self, out: Tensor, item: Input) -> float:
        """Share of the positions that count at which the right token is the most likely one."""
        hits = 0
        following = item.tokens[0].to(out.device)
        for chunk in item.rows.split(CHUNK):
            top = self.scores(out, chunk).argmax(-1)
            hits += int((top == following[chunk.to(out.device) + 1]).sum())
        return hits / len(item.rows)


def shorten(item: Input, length: int) -> Input:
    """The first tokens of a text; a retrieval prompt stays as it is."""
    if item.kind == "retrieval" or item.length <= length:
        return item
    return as_input(item.tokens[:, :length])


def strict(probe: Probe, outs: Sequence[Tensor], items: Sequence[Input]) -> float:
    """Share of retrieval prompts all of whose answer tokens are the most likely ones."""
    hits = [probe.found(out, item) == 1.0 for out, item in zip(outs, items, strict=True)]
    return sum(hits) / max(1, len(hits))
