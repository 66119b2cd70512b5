"""Attentions written out that stay dense, for reasons of their products, scores and weights.

Every program has one attention: the product, or the softmax of a chain, is its line `# here`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers.reason_inputs import N, causal


def matmul_of_mixed_dimensions(q, k, v):
    scores = (q[0] @ k.mT).masked_fill(~causal(), -torch.inf)
    return scores.softmax(-1) @ v  # here


def sinks_per_query(q, k, v):
    scores = torch.cat([(q @ k.mT).masked_fill(~causal(), -torch.inf), q[..., :1]], -1)
    return scores.softmax(-1)[..., :-1] @ v  # here


def sinks_scaled(q, k, v):
    sinks = q[0, :, 0, 0].reshape(1, -1, 1, 1).expand(1, 4, N, 1)
    scores = torch.cat([(q @ k.mT).masked_fill(~causal(), -torch.inf), sinks], -1) * 0.5
    return scores.softmax(-1)[..., :-1] @ v  # here


def sinks_kept(q, k, v):
    sinks = q[0, :, 0, 0].reshape(1, -1, 1, 1).expand(1, 4, N, 1)
    scores = torch.cat([(q @ k.mT).masked_fill(~causal(), -torch.inf), sinks], -1)
    return scores.softmax(-1) @ F.pad(v, (0, 0, 0, 1))  # here


def rectified(q, k, v):
    return (q @ k.mT).relu().softmax(-1) @ v  # here


def viewed(q, k, v):
    return (q @ k.mT).view(4, 1, N, N).softmax(-1) @ v.view(4, 1, N, -1)  # here


def added_twice(q, k, v):
    scores = q @ k.mT
    return (scores + scores).softmax(-1) @ v  # here


def subtracted(q, k, v):
    return (causal().float() - q @ k.mT).softmax(-1) @ v  # here


def added_with_alpha(q, k, v):
    bias = torch.where(causal(), 0.0, -torch.inf)
    return torch.add(q @ k.mT, bias, alpha=2.0).softmax(-1) @ v  # here


def divided_by_scores(q, k, v):
    return (1.0 / (q @ k.mT)).softmax(-1) @ v  # here


def scores_divided_by_zero(q, k, v):
    return (q @ k.mT / 0.0).softmax(-1) @ v  # here


def joined(q, k, v):
    scores = torch.cat([q @ k.mT, q @ k[:, :, :8].mT], -1)
    return scores.softmax(-1)[..., :-8] @ v  # here


def summed_over_queries(q, k, v):
    return v.mT @ (q @ k.mT).softmax(-1)  # here


def without_softmax(q, k, v):
    return (q @ k.mT).sigmoid() @ v  # here


def scores_alone(q, k, v):
    return (q @ k.mT * causal()) @ v  # here


def softmax_over_queries(q, k, v):
    return (q @ k.mT).softmax(-2) @ v  # here


def five_dimensions(q, k, v):
    q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
    weights = torch.einsum("abcij,abckj->abcik", q, k).softmax(-1)
    return torch.einsum("abcij,abcjk->abcik", weights, v)  # here


def mixed_heads(q, k, v):
    scores = F.linear((q @ k.mT).permute(0, 2, 3, 1), torch.ones(4, 4)).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v  # here


def added_to_mixed_heads(q, k, v):
    scores = q @ k.mT
    scores = scores + F.conv2d(scores, torch.ones(4, 4, 1, 1))
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


class LearnedBias(nn.Module):
    """A bias from a table, by the later position."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(2 * N, 4)

    def forward(self, q, k, v):
        later = torch.maximum(torch.arange(N)[:, None], torch.arange(N))
        bias = self.table(later).permute(2, 0, 1)[None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)  # here


def distance_of_no_keys(q, k, v):
    seen = torch.arange(N) < (q[:, 0, 0, 0] * 100).long()[:, None, None, None]
    away = (torch.arange(N) - torch.arange(N)[:, None]) * 0.1
    return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(seen, away, -1e4))  # here


def rounded(q, k, v):
    return (q @ k.mT).to(torch.int32).float().softmax(-1) @ v  # here


def rounded_to_half(q, k, v):
    scores = (q @ k.mT).half().float().masked_fill(~causal(), -torch.inf)
    return scores.softmax(-1) @ v  # here


def maximum_before_cap(q, k, v):
    scores = q @ k.mT
    scores = torch.tanh(scores - scores.amax(-1, keepdim=True)).masked_fill(~causal(), -torch.inf)
    return scores.softmax(-1) @ v  # here


def zeroed(q, k, v):
    scores = (q @ k.mT).masked_fill(torch.arange(N) > 7, 0.0).masked_fill(~causal(), -torch.inf)
    return scores.softmax(-1) @ v  # here


def first_rows_hidden(q, k, v):
    scores = (q @ k.mT).masked_fill(~(causal() & (torch.arange(N) > 7)), -1e9)
    return scores.softmax(-1) @ v  # here


def masked_twice(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, causal(), 0.0, True)  # here


def in_vmap(q, k, v):
    def inner(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # here

    return torch.vmap(inner)(q[None], k[None], v[None])


def broadcast_scores(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal().expand(2, 1, N, N), -torch.inf)
    return scores.softmax(-1) @ v  # here


def written_in_part(q, k, v):
    scores = q @ k.mT
    scores[..., 0] = 0.0
    return scores.softmax(-1) @ v  # here


def alibi(q, k, v):
    bias = (torch.arange(N)[:, None] * torch.arange(N) % 7).float().expand(4, N, N)
    scores = torch.baddbmm(bias, q[0], k[0].mT).view(1, 4, N, N)
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def two_biases(q, k, v):
    one, other = torch.arange(N) / N, torch.arange(N) % 3 / 2
    return (q @ k.mT + one + other).masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def bias_after_cap(q, k, v):
    scores = 5 * (q @ k.mT).tanh() + torch.arange(N) / N
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def bias_of_no_keys(q, k, v):
    keep = torch.arange(N) > k[:, 0, 0, :1]
    scores = q @ k.mT + torch.arange(N) / N
    return scores.masked_fill(~keep[:, None, None], -1e30).softmax(-1) @ v  # here


def scaled_after_mask(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(), -torch.inf) * -2.0
    return scores.softmax(-1) @ v  # here


def capped_twice(q, k, v):
    return (q @ k.mT).tanh().tanh().masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def scaled_by_tensor(q, k, v):
    scores = (q @ k.mT) * q[0, 0, 0, 0]
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def negative_cap(q, k, v):
    scores = (q @ k.mT).tanh() * -3.0
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def scores_returned(q, k, v):
    scores = q @ k.mT * 0.25
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v, scores.sum()  # here


def value_written(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(), -torch.inf)
    weights = scores.softmax(-1)
    v.add_(1.0)
    return weights @ v  # here


def weights_returned(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(), -torch.inf).softmax(-1)
    return weights @ v, weights  # here


def weights_changed(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(), -torch.inf).softmax(-1)
    return weights.clamp(max=0.5) @ v  # here


def weights_dropped(q, k, v):
    weights = (q @ k.mT).masked_fill(~causal(), -torch.inf).softmax(-1)
    return F.dropout(weights, 0.1) @ v  # here


def biased(q, k, v):
    bias = torch.arange(N)
    return (q @ k.mT + bias).softmax(-1) @ v  # here


def nan_added(q, k, v):
    scores = (q @ k.mT).masked_fill(~causal(), torch.nan)
    return scores.softmax(-1) @ v  # here
