"""A bias per key, carried by more channels of query and key: every kernel and estimator sees it.

Attention that adds b[h, j] to the score of key j is attention over longer vectors: the key gets b /
scale as a channel more and the query the number 1, so that scale * (q, 1) . (k, b / scale) = scale
* q . k + b. No kernel and no estimator has to know. ALiBi is such a bias: slope * (j - i) differs
from slope * j by one number for a whole row, which softmax does not see. The slope of each query
head reads a channel of its own where several share a kv head.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpass.lowering.define import NAMESPACE

PARTS = {torch.float64: 1, torch.float32: 1, torch.bfloat16: 3, torch.float16: 3}
"""Channels that hold one bias: what one number of the dtype cannot say, the next ones do."""

CHANNELS = 8
"""Head dims are widened by a multiple of this."""

ABSORBING = -(2.0**29)
"""A number this low plus a score is that number in fp32, in which attention is computed: of 2^29
the next step is 64."""

LARGEST = {torch.float16: 3e4}
"""The largest number that a channel may hold, where infinity is near."""


def bias_channels(dtype: torch.dtype, heads: int, kv_heads: int, bias_heads: int) -> int:
    """How many channels query and key get.

    bias_heads: heads that have a bias of their own: 1, the kv heads, or the query heads.
    """
    own = heads // kv_heads if bias_heads == heads else 1
    needed = PARTS[dtype] * own
    return -(-needed // CHANNELS) * CHANNELS


def with_key_bias(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Query [B, H, Nq, D + C] and key [B, Hk, Nk, D + C] whose scores have the bias in them.

    query: [B, H, Nq, D]. key: [B, Hk, Nk, D]. scale: factor of the scores, not 0.
    bias: float [B or 1, H or Hk or 1, Nk], added to the scaled scores.
    """
    batch, heads, num_queries, _ = query.shape
    kv_heads, num_keys = key.shape[1:3]
    wide = torch.promote_types(bias.dtype, torch.float32)
    own = heads // kv_heads if bias.shape[1] == heads else 1
    rows = bias.to(wide) / scale
    if bias.shape[1] == heads:
        rows = rows.reshape(rows.shape[0], kv_heads, own, num_keys)
    else:
        rows = rows[:, :, None]
    rows = rows.expand(batch, kv_heads, own, num_keys).transpose(2, 3)
    factor = 1.0
    limit = LARGEST.get(query.dtype, 1e30)
    if query.dtype == torch.float16:  # the query has a larger number, the key a smaller one
        factor = 2.0**6
        rows = rows / factor
    rows = rows.clamp(-limit, limit)  # zero times infinity is no number in the heads beside it
    parts = []
    for _ in range(PARTS[query.dtype]):
        part = rows.to(query.dtype)
        parts.append(part)
        rows = rows - part.to(wide)
    count = len(parts) * own
    channels = -(-count // CHANNELS) * CHANNELS
    more_keys = key.new_zeros(batch, kv_heads, num_keys, channels)
    more_keys[..., :count] = torch.cat(parts, dim=-1)
    more_queries = query.new_zeros(batch, heads, num_queries, channels)
    reads = torch.arange(heads, device=query.device) % own
    picked = torch.nn.functional.one_hot(reads, own).repeat(1, len(parts)).to(query.dtype)
    more_queries[..., :count] = picked[None, :, None, :] * factor
    return torch.cat([query, more_queries], -1), torch.cat([key, more_keys], -1)


def as_rows(bias: Tensor, batch: int, heads: int) -> Tensor:
    """A bias of any number of dimensions, with one query row, as [B or 1, H' or 1, Nk].

    bias: [B or 1, H' or 1, 1, Nk]; [B * H, 1, Nk], [H, 1, Nk] or [1, 1, Nk]; [1, Nk]; or [Nk].
    """
    if bias.dim() == 4:
        return bias[:, :, 0]
    if bias.dim() < 3:
        return bias.reshape(1, 1, bias.shape[-1])
    rows = bias[:, 0]
    return rows.reshape(batch, heads, -1) if rows.shape[0] == batch * heads else rows[None]


@torch.library.custom_op(
    f"{NAMESPACE}::with_key_bias",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor bias, float factor, float scale, bool shifted) -> "
    "(Tensor, Tensor)",
)
def with_key_bias_op(
    query: Tensor, key: Tensor, bias: Tensor, factor: float, scale: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    """`with_key_bias` of a bias in the dimensions that a program has it in, times a factor.

    shifted: take the largest of all keys from each, so that small numbers are rounded and not large
    ones. No weight changes by it, but sinks and log-sum-exps would.
    """
    rows = as_rows(bias, query.shape[0], query.shape[1])
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)) * factor
    if shifted:
        best = rows.amax(-1, keepdim=True)
        rows = rows - best
        query = without_hidden(query, best)
    return with_key_bias(query, key, rows.expand(*rows.shape[:2], key.shape[2]), scale)


def without_hidden(query: Tensor, best: Tensor) -> Tensor:
    """The query [B, H, Nq, D] with zeros where a number hides every key of a batch row and head.

    best: [B or 1, H, Hk or 1, 1], the largest numbers. Scores of such a row are all that number,
    and its weights are alike whatever the query is.
    """
    hidden = (best <= ABSORBING)[..., None]
    if hidden.device.type == "cpu" and not bool(hidden.any()):
        return query
    if hidden.shape[1] not in (1, query.shape[1]):
        hidden = hidden.repeat_interleave(query.shape[1] // hidden.shape[1], 1)
    return query.masked_fill(hidden, 0.0)


@with_key_bias_op.register_fake
def _(
    query: Tensor, key: Tensor, bias: Tensor, factor: float, scale: float, shifted: bool
) -> tuple[Tensor, Tensor]:
    heads, kv_heads = query.shape[1], key.shape[1]
    if bias.dim() == 4:
        own = bias.shape[1]
    else:
        own = heads if bias.dim() == 3 and not statically_one(bias.shape[0]) else 1
    channels = bias_channels(query.dtype, heads, kv_heads, heads if own == heads else 1)

    def wider(tensor: Tensor) -> Tensor:
        return tensor.new_empty(*tensor.shape[:3], tensor.shape[3] + channels)

    return wider(query), wider(key)


def statically_one(size: int) -> bool:
    """Whether a size is the number 1 and no symbol."""
    return isinstance(size, int) and size == 1


def bias_gradient(
    grad_key: Tensor, bias: Tensor, heads: int, dim: int, factor: float, scale: float
) -> Tensor:
    """The gradient of a bias from that of the wider keys, in the bias's shape and dtype.

    grad_key: [B, Hk, Nk, D + C], whose channel D + r is scale times the sum over queries of the
    gradients of the scores of the r-th query head. What is taken from all numbers of a row (see
    `shifted`) has no gradient, since softmax does not see it.
    """
    batch, kv_heads, num_keys, _ = grad_key.shape
    rows = as_rows(bias, batch, heads)
    own = heads // kv_heads if rows.shape[1] == heads else 1
    wide = torch.promote_types(grad_key.dtype, torch.float32)
    larger = 2.0**6 if grad_key.dtype == torch.float16 else 1.0
    found = grad_key[..., dim : dim + own].to(wide).transpose(2, 3) * (factor / scale / larger)
    found = found.reshape(batch, kv_heads * own, num_keys)
    for place, size in enumerate(rows.shape):
        if statically_one(size):
            found = found.sum(place, keepdim=True)
    if bias.dim() == 3 and not statically_one(bias.shape[0]) and rows.shape[0] == 1:
        found = found[0][:, None]
    return found.reshape(bias.shape).to(bias.dtype)


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    """Save what the shape of the bias is, and the numbers; no value of a tensor is needed."""
    query, key, bias, factor, scale, _ = inputs
    ctx.save_for_backward(bias)
    ctx.numbers = (query.shape[1], key.shape[3], factor, scale)


def backward(ctx: Any, grad_query: Tensor, grad_key: Tensor) -> tuple[Any, ...]:
    """The autograd formula: gradients of query, key and bias."""
    (bias,) = ctx.saved_tensors
    heads, dim, factor, scale = ctx.numbers
    grad_bias = bias_gradient(grad_key, bias, heads, dim, factor, scale)
    return grad_query[..., :dim], grad_key[..., :dim], grad_bias, None, None, None


with_key_bias_op.register_autograd(backward, setup_context=keep_for_backward)
