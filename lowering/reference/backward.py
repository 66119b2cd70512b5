"""Gradients of sparse attention in plain torch: what generated backward kernels are tested against.

No gradient goes through the choice of keys: an index is a constant. Nothing here builds an Nq x Nk
tensor: queries are taken a chunk of blocks at a time. Letters: B batch, H query heads, Hk key/value
heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import query_chunks, repeat_kv, visible_rows


@dataclass(frozen=True, slots=True, eq=False)
class ForwardResult:
    """What a forward pass leaves for the backward one.

    grad_out: the gradient of `out`; out: [B, H, Nq, Dv]; lse: log-sum-exps [B, H, Nq] in fp32, of
    fp64 inputs in fp64. grad_bias: [H or 1, L], to which the gradient of a bias by distance is
    added; None where there is none or nobody asks.
    """

    grad_out: Tensor
    out: Tensor
    lse: Tensor
    grad_bias: Tensor | None = None


Gradients = tuple[Tensor, Tensor, Tensor]
"""Of query, key and value, in their shapes and dtypes."""


def attention_backward(
    inputs: AttentionInputs, index: SparseIndex, result: ForwardResult
) -> Gradients:
    """The gradients of query, key and value; computed in fp32, of fp64 inputs in fp64.

    With weights P = e^(score - lse) and D the sum of out * grad_out of a row, a score's gradient is
    P * (grad_out V^T - D) (Dao et al. 2022, FlashAttention, appendix B).
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    batch, heads, num_queries, _ = query.shape
    num_keys, wide = key.shape[2], result.lse.dtype
    keys, values = repeat_kv(key, heads).to(wide), repeat_kv(value, heads).to(wide)
    grad_query = torch.empty_like(query, memory_format=torch.contiguous_format)
    grad_keys, grad_values = torch.zeros_like(keys), torch.zeros_like(values)
    dots = row_dots(result)
    for rows in query_chunks(num_queries, mask.query_offset):
        visible = visible_rows(index, mask, rows, batch=batch, num_keys=num_keys)
        queries, grads = query[:, :, rows].to(wide), result.grad_out[:, :, rows].to(wide)
        scores = queries @ keys.mT * inputs.scale
        own = torch.arange(rows.start, rows.stop, device=query.device)
        if inputs.distance_bias is not None:
            scores += bias_rows(inputs.distance_bias.to(wide), own, num_queries, 0, num_keys)
        slope = None
        if inputs.softcap > 0:
            bent = torch.tanh(scores / inputs.softcap)
            scores, slope = inputs.softcap * bent, 1 - bent * bent
        lse = result.lse[:, :, rows, None]
        weights = torch.exp(scores - lse).masked_fill(~visible, 0.0)
        grad_scores = weights * (grads @ values.mT - dots[:, :, rows, None])
        if slope is not None:
            grad_scores = grad_scores * slope
        if result.grad_bias is not None:
            add_to_line(result.grad_bias, grad_scores, own, num_queries)
        grad_query[:, :, rows] = (grad_scores @ keys * inputs.scale).to(query.dtype)
        grad_keys += grad_scores.mT @ queries * inputs.scale
        grad_values += weights.mT @ grads
    group = (batch, key.shape[1], heads // key.shape[1], num_keys)
    grad_key = grad_keys.view(*group, -1).sum(2).to(key.dtype)
    return grad_query, grad_key, grad_values.view(*group, -1).sum(2).to(value.dtype)


def add_to_line(line: Tensor, grad_scores: Tensor, rows: Tensor, num_queries: int) -> None:
    """Add the gradients of scores [B, H, R, Nk] of some rows to those of their distances."""
    starts = (num_queries - 1 - rows)[:, None]
    places = (starts + torch.arange(grad_scores.shape[-1], device=line.device)).flatten()
    of_heads = grad_scores.sum(0).flatten(1)
    if line.shape[0] == 1:
        of_heads = of_heads.sum(0, keepdim=True)
    line.index_add_(1, places, of_heads.to(line.dtype))


def row_dots(result: ForwardResult) -> Tensor:
    """The sum of out * grad_out of each row [B, H, Nq]: what softmax takes from every gradient."""
    wide = result.lse.dtype
    return (result.out.to(wide) * result.grad_out.to(wide)).sum(-1)


def sink_gradient(inputs: AttentionInputs, result: ForwardResult) -> Tensor | None:
    """The gradient of the sinks [H], None where there are none.

    A sink has a weight and no value, so that all that its weight takes from a row is the row's D.
    """
    sinks = inputs.sink_logits
    if sinks is None:
        return None
    lse = result.lse
    weights = torch.exp(sinks.to(lse.dtype).view(1, -1, 1) - lse)
    return -(weights * row_dots(result)).sum((0, 2)).to(sinks.dtype)


__all__ = ["ForwardResult", "Gradients", "attention_backward", "row_dots", "sink_gradient"]
