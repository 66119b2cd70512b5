"""Inputs whose scores are far beyond what a model has, and the rows whose result is certain."""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import repeat_kv
from tests.helpers.truth import random_attention

SIZES = (1e4, 1e7, 1e8, 1e12, 1e16, 1e30)
"""How large scores are, about."""

ROWS = ("all", "mixed", "negative")
"""Which rows have them: all, every second one beside ordinary ones, or all, and all below zero."""

LARGEST = {torch.float16: 3e3, torch.bfloat16: 1e15, torch.float32: 1e15}
"""The largest number that a query or key is multiplied with."""

CERTAIN = 1e-4
"""Share of the largest score by which the greatest of a row must lead to be its clear winner."""


def huge_inputs(
    dtype: torch.dtype, size: float, rows: str, *, num_keys: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of two heads and one kv head, [1, H, num_keys, 64].

    Numbers in fp16, at most 65504, give scores of some 1e9 whatever the size.
    """
    query, key, value = random_attention(
        heads=2, kv_heads=1, num_queries=num_keys, head_dim=64, seed=seed
    )
    if rows == "negative":
        query, key = query - 3.0, key + 3.0
    factor = min(size**0.5, LARGEST[dtype])
    query, key = query * factor, key * factor
    if rows == "mixed":
        query[:, :, ::2] /= factor * factor
    return query.to(dtype), key.to(dtype), value.to(dtype)


def clear_rows(inputs: AttentionInputs, cells: Tensor) -> Tensor:
    """The rows that rounding cannot change much: bool [B, H, Nq].

    inputs: in fp64; cells: bool [B, H, Nq, Nk], what is computed. A row is clear if its scores are
    ordinary, or if the greatest of them (a sink is one more) leads by far.
    """
    keys = repeat_kv(inputs.key, inputs.query.shape[1])
    scores = inputs.query @ keys.mT * inputs.scale
    if inputs.softcap > 0:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        return torch.ones_like(scores[..., 0], dtype=torch.bool)
    scores = scores.masked_fill(~cells, -torch.inf)
    if inputs.sink_logits is not None:
        sinks = inputs.sink_logits.to(scores.dtype).view(1, -1, 1, 1)
        scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
    size = scores.abs().masked_fill(scores.isinf(), 0.0).amax(-1)
    best = scores.topk(min(2, scores.shape[-1])).values
    lead = (best[..., 0] - best[..., -1]).nan_to_num(torch.inf, posinf=torch.inf)
    return (size < 50.0) | (lead > 40.0 + CERTAIN * size)
