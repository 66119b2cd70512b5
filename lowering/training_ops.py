"""Attention over an index with gradients: what `options={"training": "sparse"}` puts into graphs.

`minference::sparse_attention_train` has an autograd formula, whose backward is an op as well, so
that AOTAutograd traces both. The forward pass leaves its output, the log-sum-exps and the index;
no gradient goes through the choice of keys. Letters: B batch, H query heads, Hk kv heads, Nq
queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpass.failures import contain
from mpass.lowering.define import NAMESPACE
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.lse_ops import ATTENTION_LSE, every_key, fake_attention_lse
from mpass.lowering.ops import (
    ARGUMENTS,
    ATTENTION_SCHEMA,
    INDEX_SCHEMA,
    OverIndex,
    attend,
    over_index,
)
from mpass.lowering.reference.backward import ForwardResult, attention_backward, sink_gradient

SINKS, SOFTCAP, DISTANCE_BIAS = 11, 16, ARGUMENTS
"""Places among the arguments of `minference::sparse_attention_train`."""


@torch.library.custom_op(
    f"{NAMESPACE}::sparse_attention_train",
    mutates_args=(),
    schema=f"({ATTENTION_SCHEMA}, Tensor? distance_bias=None) -> (Tensor, Tensor, Tensor)",
)
def sparse_attention_train(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    """`minference::sparse_attention`, which see, with gradients for its tensors of numbers.

    Returns the output, the log-sum-exps [B, H, Nq] in fp32 and, bool [1] on the CPU, whether every
    key was computed: the backward pass must compute the same cells, whatever decided about them.
    """
    done = attend(
        with_bias(over_index(*arguments[:ARGUMENTS]), *arguments[ARGUMENTS:]), ATTENTION_LSE
    )
    return *done.result, torch.tensor([bool(done.reason)], device="cpu")


def with_bias(call: OverIndex, distance_bias: Tensor | None = None) -> OverIndex:
    """A call with a bias by distance, if there is one."""
    if distance_bias is None:
        return call
    return replace(call, inputs=replace(call.inputs, distance_bias=distance_bias))


@sparse_attention_train.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> tuple[Tensor, Tensor, Tensor]:
    dense = torch.empty(1, dtype=torch.bool, device="cpu")
    return (*fake_attention_lse(query, key, value), dense)


@torch.library.custom_op(
    f"{NAMESPACE}::sparse_attention_backward",
    mutates_args=(),
    schema="(Tensor grad_out, Tensor out, Tensor lse, Tensor dense, Tensor query, Tensor key, "
    f"Tensor value, {INDEX_SCHEMA}, Tensor? key_mask, Tensor? sinks, SymInt query_offset, "
    "int window, bool causal, float scale, float softcap, Tensor? distance_bias=None) -> "
    "(Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def sparse_attention_backward(
    grad_out: Tensor, out: Tensor, lse: Tensor, dense: Tensor, *arguments: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value, sinks and bias (empty where there are none), contiguous.

    grad_out: of `out`; out, lse, dense: what `minference::sparse_attention_train` returned.
    """
    plain = SOFTCAP + 1
    call = with_bias(over_index(*arguments[:plain]), *arguments[plain:])
    inputs, index = call.inputs, call.index
    if bool(dense):
        index = every_key(inputs)
    bias = inputs.distance_bias
    grad_bias = None if bias is None else torch.zeros_like(bias, dtype=lse.dtype)
    result = ForwardResult(grad_out, out, lse, grad_bias)
    grad_sinks = sink_gradient(inputs, result)
    lowering = choose_lowering(inputs)
    run = lowering.attention_backward or attention_backward
    try:
        gradients = run(inputs, index, result)
    except Exception as error:
        contain(error, f"a kernel of the backward pass ({lowering.name})")
        if grad_bias is not None:
            grad_bias.zero_()
        gradients = attention_backward(inputs, index, result)
    none = out.new_empty(0)
    of_bias = none if bias is None or grad_bias is None else grad_bias.to(bias.dtype)
    return (*gradients, none.clone() if grad_sinks is None else grad_sinks, of_bias)


@sparse_attention_backward.register_fake
def _(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    dense: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *rest: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sinks, bias = rest[8], rest[14] if len(rest) > 14 else None
    grad_query, grad_key, grad_value = (t.new_empty(t.shape) for t in (query, key, value))
    grad_sinks = query.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    grad_bias = query.new_empty(0) if bias is None else bias.new_empty(bias.shape)
    return grad_query, grad_key, grad_value, grad_sinks, grad_bias


def keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save what the backward op takes: the arguments up to softcap, the bias, and the results."""
    out, lse, dense = output
    bias = inputs[DISTANCE_BIAS] if len(inputs) > DISTANCE_BIAS else None
    arguments = (*inputs[: SOFTCAP + 1], bias)
    ctx.mark_non_differentiable(lse, dense)
    ctx.places = [place for place, a in enumerate(arguments) if isinstance(a, Tensor)]
    ctx.arguments = [None if isinstance(a, Tensor) else a for a in arguments]
    ctx.save_for_backward(out, lse, dense, *(arguments[place] for place in ctx.places))


def backward(ctx: Any, grad_out: Tensor | None, *unused: object) -> tuple[Any, ...]:
    """The autograd formula: gradients for query, key, value, sinks and bias, and nothing else."""
    out, lse, dense, *tensors = ctx.saved_tensors
    arguments = list(ctx.arguments)
    for place, tensor in zip(ctx.places, tensors, strict=True):
        arguments[place] = tensor
    gradients: list[Any] = [None] * len(ctx.needs_input_grad)
    if grad_out is not None:
        op = torch.ops.minference.sparse_attention_backward.default
        *main, sinks, bias = op(grad_out, out, lse, dense, *arguments)
        gradients[:3] = main
        gradients[SINKS] = None if arguments[SINKS] is None else sinks
        if arguments[-1] is not None:
            gradients[DISTANCE_BIAS] = bias
    return tuple(gradients)


sparse_attention_train.register_autograd(backward, setup_context=keep_for_backward)
