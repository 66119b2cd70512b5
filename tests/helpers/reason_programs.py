"""Attentions that stay dense whatever their mask, one per reason, with words of the reason.

Every program has one attention: the call, or the softmax of a chain, is its line `# here`.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils.checkpoint import checkpoint

from mpass import SparseConfig
from tests.helpers import reason_scores as scores
from tests.helpers.reason_flex import (
    flex_biased,
    flex_made_inside,
    flex_scaled,
    flex_with,
    flex_with_sums,
    half_the_keys,
    other_blocks,
)
from tests.helpers.reason_inputs import Case, N, causal
from tests.helpers.reason_projections import projecting, projecting_in_autocast

# -- scaled_dot_product_attention -------------------------------------------------------------


def plain(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # here


def bidirectional(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)  # here


def dropped(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.25)  # here


def without_batch(q, k, v):
    return F.scaled_dot_product_attention(q[0], k[0, :1], v[0], is_causal=True)  # here


def broadcast_batch(q, k, v):
    q = q.flatten(0, 1)[:, None]
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # here


def scaled_by_length(q, k, v):
    scale = q.shape[2] ** -0.5
    return F.scaled_dot_product_attention(q, q, q, is_causal=True, scale=scale)  # here


def scaled_by_zero(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.0)  # here


def scaled_by_infinity(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, scale=float("inf"))  # here


def scores_divided_by_nan(q, k, v):
    return (q @ k.mT / float("nan")).masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def softcap_of_infinity(q, k, v):
    scores = float("inf") * torch.tanh(q @ k.mT / float("inf"))
    return scores.masked_fill(~causal(), -torch.inf).softmax(-1) @ v  # here


def dropped_by_length(q, k, v):
    p = 1.0 / q.shape[2]
    return F.scaled_dot_product_attention(q, q, q, is_causal=True, dropout_p=p)  # here


def offset_by_half(q, k, v):
    rows, columns = torch.arange(q.shape[2]), torch.arange(k.shape[2])
    mask = columns <= rows[:, None] + k.shape[2] // 2
    return F.scaled_dot_product_attention(q, k, k, attn_mask=mask)  # here


class Encoder(nn.Module):
    """torch's own layer, whose attention is inside of one op in inference."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(64, 4, batch_first=True).eval()

    def forward(self, q, k, v):
        x = q.transpose(1, 2).flatten(2)
        hidden = torch.ones(N, N).triu(1).bool()
        padding = x[..., 0] > 9
        return self.layer(x, hidden, padding)  # here


def checkpointed(q, k, v):
    def inner(q, k, v):
        k = k.clone()
        k.add_(1.0)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # here

    return checkpoint(inner, q, k, v, use_reentrant=False)


def checkpointed_after_a_write(q, k, v):
    k.add_(1.0)

    def inner(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)  # here

    return checkpoint(inner, q, k, v, use_reentrant=False)


class Heads(nn.Module):
    """One attention, so that it has a layer and a path."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Identity()])

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v)  # here


class HeadsUnderMask(Heads):
    """The same under a mask of which nothing is known."""

    def forward(self, q, k, v):
        mask = k[..., 0, 0].mean() + torch.zeros(N, N)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # here


PROGRAMS: dict[str, Case] = {
    "gradients": Case(plain, "gradients are recorded", grad=True),
    "dropout": Case(dropped, "dropout p=0.25"),
    "dtype": Case(plain, "dtype torch.float64 is not served", {"dtype": torch.float64}),
    "device": Case(plain, "no kernels are generated for device 'meta'", {"device": "meta"}),
    "head_dim": Case(plain, "head_dim 320 is over 256", {"dim": 320}),
    "not causal": Case(
        bidirectional,
        "is defined for causal attention only",
        options={"pattern": "vertical_slash"},
    ),
    "not causal by default": Case(bidirectional, "not causal: dense by default"),
    "other model's config": Case(
        Heads(), "not causal, and", options={"config": SparseConfig("a_shape", num_heads=7)}
    ),
    "other model's config under a mask": Case(
        HeadsUnderMask(),
        "it is not known to be causal, and",
        options={"config": SparseConfig("a_shape", num_heads=7), "read_masks": True},
    ),
    "batch": Case(broadcast_batch, "batch is broadcast", {"kv_heads": 1}),
    "dimensions": Case(without_batch, "3, 3, 3 dimensions and cannot be read"),
    "value heads": Case(plain, "differ in heads:", {"value_heads": 1}),
    "dynamic heads": Case(plain, "number of heads or head_dim is dynamic", all_dynamic=True),
    "dropout by length": Case(
        dropped_by_length, "dropout probability is not a constant", dynamic=((0, 2),)
    ),
    "half the length": Case(
        offset_by_half, "is not made of the graph's sizes", dynamic=((0, 2), (1, 2))
    ),
    "encoder layer": Case(Encoder(), "fast path makes rows NaN that see no key"),
    "checkpoint that writes": Case(checkpointed, "the sub-graph writes in place"),
    "checkpoint after a write": Case(
        checkpointed_after_a_write, "an argument of the sub-graph is written in place"
    ),
    "scale of zero": Case(scaled_by_zero, "scale is 0"),
    "scale of infinity": Case(scaled_by_infinity, "scale is inf: scores are no numbers"),
    "scale of NaN": Case(scores_divided_by_nan, "scale is nan: scores are no numbers"),
    "softcap of infinity": Case(softcap_of_infinity, "scale is nan: scores are no numbers"),
    "scale": Case(scaled_by_length, "scale is not a constant", dynamic=((0, 2),)),
    "queries past keys": Case(plain, "after the last key", {"keys": N - 40}),
    "short": Case(plain, "100 keys, sparse from 128 on", {"queries": 100, "keys": 100}),
    "few queries": Case(plain, "60 queries, sparse from 128 on", {"queries": 60}),
    "decoding": Case(plain, "one query: there is nothing to skip", {"queries": 1}),
    "config": Case(plain, "the config keeps every head", options={"pattern": "dense"}),
    "projections and weights": Case(projecting(need_weights=True), "computes its weights"),
    "projections and zeros": Case(projecting(add_zero_attn=True), "adds a key of zeros"),
    "projections and a learned key": Case(
        projecting(bias_k=torch.ones(1, 1, 64), bias_v=torch.ones(1, 1, 64)),
        "adds a learned key and value",
    ),
    "projected key": Case(projecting(static_k=torch.ones(4, N, 16)), "is given projected keys"),
    "projections in autocast": Case(projecting_in_autocast, "in parts: dtype"),
    "bmm": Case(scores.matmul_of_mixed_dimensions, "the products are not of [B, H, N, D] tensors"),
    "sinks per query": Case(scores.sinks_per_query, "sinks are not one number per head"),
    "sinks scaled": Case(scores.sinks_scaled, "scores are changed by mul beside attention sinks"),
    "sinks kept": Case(scores.sinks_kept, "attention sinks are not cut off the weights"),
    "relu": Case(scores.rectified, "scores are changed by relu before the softmax"),
    "reshaped scores": Case(scores.viewed, "scores are reshaped by view before the softmax"),
    "added twice": Case(scores.added_twice, "scores are used twice by add"),
    "subtracted": Case(scores.subtracted, "scores are not the operand that sub masks"),
    "alpha": Case(scores.added_with_alpha, "alpha of add is not understood on scores"),
    "divided by scores": Case(scores.divided_by_scores, "something is divided by the scores"),
    "divided by zero": Case(scores.scores_divided_by_zero, "scores are divided by zero"),
    "joined": Case(scores.joined, "scores are joined with others by cat"),
    "over queries": Case(scores.summed_over_queries, "which sums over queries"),
    "no softmax": Case(scores.without_softmax, "its weights are made by sigmoid"),
    "scores as weights": Case(scores.scores_alone, "made by scaling and masking the scores"),
    "softmax over queries": Case(
        scores.softmax_over_queries, "is over another dimension than the keys"
    ),
    "five dimensions": Case(scores.five_dimensions, "scores have 5 dimensions"),
    "added to mixed heads": Case(
        scores.added_to_mixed_heads,
        "attention scores are also read by conv2d, whose result goes back into them",
    ),
    "mixed heads": Case(scores.mixed_heads, "between its two products are linear, softmax"),
    "learned bias": Case(
        scores.LearnedBias(), "a learned bias is added, which is no mask: self.table"
    ),
    "rounded": Case(scores.rounded, "scores or weights are rounded to torch.int32"),
    "rounded to half": Case(scores.rounded_to_half, "scores of torch.float32 are rounded to"),
    "maximum before cap": Case(scores.maximum_before_cap, "is subtracted before sinks or tanh"),
    "zeroed": Case(scores.zeroed, "scores are replaced or scaled where a key is seen"),
    "first rows hidden": Case(scores.first_rows_hidden, "are a mean of values"),
    "masked twice": Case(scores.masked_twice, "attn_mask together with is_causal=True"),
    "no channels": Case(plain, "there are no heads, or no channels", {"dim": 0}),
    "vmap": Case(scores.in_vmap, "inside of torch.vmap or torch.func"),
    "broadcast": Case(scores.broadcast_scores, "scores are broadcast or reshaped by masked_fill"),
    "written in part": Case(scores.written_in_part, "scores are written in place"),
    "baddbmm": Case(scores.alibi, "baddbmm adds to the scores what is not known to be"),
    "two biases": Case(scores.two_biases, "two biases are added to the scores"),
    "bias after a cap": Case(scores.bias_after_cap, "is added to scores that have a softcap"),
    "bias of rows without keys": Case(
        scores.bias_of_no_keys, "rows that see no key have a bias per key"
    ),
    "distances of rows without keys": Case(
        scores.distance_of_no_keys, "rows that see no key have a bias by distance"
    ),
    "scaled after the mask": Case(
        scores.scaled_after_mask, "changed by mul after a mask or a bias"
    ),
    "capped twice": Case(scores.capped_twice, "two tanh on the scores"),
    "scaled by a tensor": Case(
        scores.scaled_by_tensor, "scores are scaled by what is not a constant"
    ),
    "negative cap": Case(scores.negative_cap, "softcap of -3.0"),
    "scores read": Case(scores.scores_returned, "attention scores are also read by"),
    "value written": Case(scores.value_written, "is written in place before the output"),
    "weights returned": Case(scores.weights_returned, "attention weights are read more than once"),
    "weights changed": Case(scores.weights_changed, "attention weights are changed by clamp"),
    "weights dropped": Case(scores.weights_dropped, "dropout p=0.1 on attention weights"),
    "bias on scores": Case(scores.biased, "additive bias, no mask"),
    "nan on scores": Case(scores.nan_added, "masked_fill on the scores: nan"),
    "flex scale": Case(flex_scaled, "scale is not a constant", dynamic=((0, 2),)),
    "score_mod": Case(flex_biased, "score_mod is neither the identity nor a softcap"),
    "log-sum-exp": Case(flex_with_sums, "flex_attention returns its log-sum-exp"),
    "blocks made inside": Case(flex_made_inside, "blocks of the BlockMask are not known"),
    "fewer keys": Case(
        flex_with(create_block_mask(half_the_keys, None, None, N, N, device="cpu")),
        "a BlockMask over fewer keys than there are",
        options={"pattern": "block_sparse"},
    ),
    "other blocks": Case(flex_with(other_blocks()), "blocks of the BlockMask are not those of"),
}
