"""Attention under a mask that is trained: `minference::dynamic_mask_attention` and its backward.

lowering/reference/dynamic_mask.py says what they mean. The choice of keys is the program's own and
no estimate: nothing is lost, and no budget is given. No gradient goes through it; through the
numbers that are added to the scores of the keys that were chosen it does. Letters: B batch, H query
heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mpass.lowering.define import NAMESPACE
from mpass.lowering.reference import dynamic_mask as reference
from mpass.lowering.reference.attention import empty_lse, empty_output
from mpass.lowering.reference.dynamic_mask import DynamicMask

SCHEMA = (
    "Tensor query, Tensor key, Tensor value, Tensor bias, Tensor? key_mask, int keep, "
    "float hidden, bool early, SymInt query_offset, float scale"
)
"""The arguments of both ops; the backward one takes three tensors before them."""

TENSORS = 4
"""Arguments that have gradients: query, key, value and bias."""


def mask_of(
    bias: Tensor, key_mask: Tensor | None, keep: int, hidden: float, early: bool, offset: int
) -> DynamicMask:
    """The arguments of an op as a mask."""
    return DynamicMask(bias, keep, hidden, early, offset, key_mask)


@torch.library.custom_op(
    f"{NAMESPACE}::dynamic_mask_attention",
    mutates_args=(),
    schema=f"({SCHEMA}) -> (Tensor, Tensor)",
)
def dynamic_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    """Attention to the `keep` visible keys whose numbers are largest, with these numbers added.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] -> the output [B, H, Nq, Dv],
    laid out as [B, Nq, H, Dv], and the log-sum-exps [B, H, Nq] in fp32. bias: [B or 1, H or Hk or
    1, 1, Nk]. keep, hidden, early, query_offset, key_mask: see `DynamicMask`. Rows that see no key
    are zeros.
    """
    *mask, scale = rest
    return reference.dynamic_mask_attention(query, key, value, mask_of(*mask), scale)


@dynamic_mask_attention.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return empty_output(query, value), empty_lse(query)


@torch.library.custom_op(
    f"{NAMESPACE}::dynamic_mask_backward",
    mutates_args=(),
    schema=f"(Tensor grad_out, Tensor out, Tensor lse, {SCHEMA}) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
)
def dynamic_mask_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias, contiguous.

    grad_out: of `out`; out, lse: what `minference::dynamic_mask_attention` returned. The keys are
    chosen again, from the same numbers, and so are the same.
    """
    *mask, scale = rest
    found = reference.dynamic_mask_backward(
        grad_out, out, lse, query, key, value, mask_of(*mask), scale
    )
    query_gradient, key_gradient, value_gradient, bias_gradient = (g.contiguous() for g in found)
    return query_gradient, key_gradient, value_gradient, bias_gradient


@dynamic_mask_backward.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    empty = [tensor.new_empty(tensor.shape) for tensor in (query, key, value, bias)]
    return empty[0], empty[1], empty[2], empty[3]


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save the arguments and the results: all of them are O(N)."""
    *tensors, key_mask = inputs[: TENSORS + 1]
    ctx.mark_non_differentiable(output[1])
    ctx.masked = key_mask is not None
    ctx.rest = inputs[TENSORS + 1 :]
    ctx.save_for_backward(*output, *tensors, *([key_mask] if ctx.masked else []))


def backward(ctx: Any, grad_out: Tensor | None, *unused: object) -> tuple[Any, ...]:
    """The autograd formula: gradients for query, key, value and bias, and for nothing else."""
    gradients: list[Any] = [None] * len(ctx.needs_input_grad)
    if grad_out is not None:
        saved = list(ctx.saved_tensors)
        key_mask = saved.pop() if ctx.masked else None
        op = torch.ops.minference.dynamic_mask_backward.default
        gradients[:TENSORS] = op(grad_out, *saved, key_mask, *ctx.rest)
    return tuple(gradients)


dynamic_mask_attention.register_autograd(backward, setup_context=keep_for_backward)
