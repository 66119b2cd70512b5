"""Attention that returns its log-sum-exp as well: ops of their own, so that others pay nothing.

Log-sum-exps join attentions over parts of the keys, and a backward pass makes the weights from them
again. Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from mpass.failures import contain
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.device import Lowering
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import (
    AttentionMask,
    IndexWidth,
    SparseIndex,
    list_slots,
    num_query_blocks,
    whole_index,
)
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.ops import ATTENTION_SCHEMA, Computation, attend, over_index
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.attention import empty_lse, empty_output


def every_key(inputs: AttentionInputs) -> SparseIndex:
    """The index of all that the mask allows, causal or not."""
    query = inputs.query
    rows = num_query_blocks(query.shape[2], inputs.mask.query_offset)
    return whole_index(query, rows, IndexWidth(), list_slots(query.shape[1]))


def dense_attention_lse(lowering: Lowering, inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Dense attention and its log-sum-exps: the sparse kernel over every key."""
    out, lse = lowering.sparse_attention_lse(inputs, every_key(inputs))
    return out, lse


def plain_attention_lse(inputs: AttentionInputs) -> tuple[Tensor, Tensor]:
    """Dense attention and its log-sum-exps by plain torch."""
    return reference.sparse_attention_lse(inputs, every_key(inputs))


ATTENTION_LSE: Computation[tuple[Tensor, Tensor]] = Computation(
    lambda lowering, inputs, index: lowering.sparse_attention_lse(inputs, index),
    dense_attention_lse,
    plain_attention_lse,
)


@define_op("sparse_attention_lse", f"({ATTENTION_SCHEMA}) -> (Tensor, Tensor)")
def sparse_attention_lse(*arguments: Any) -> tuple[Tensor, Tensor]:
    """`minference::sparse_attention`, which see, and the log-sum-exps [B, H, Nq] in fp32.

    A log-sum-exp is the natural logarithm of the sum of e^score over the keys that were computed,
    sinks included; scores are scaled and capped. It is that of all keys where dense attention ran.
    """
    return attend(over_index(*arguments), ATTENTION_LSE).result


@define_op(
    "attention_lse",
    "(Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor? sinks, "
    "SymInt query_offset, int window, bool causal, float scale, float softcap) -> "
    "(Tensor, Tensor)",
)
def attention_lse(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    sinks: Tensor | None,
    query_offset: int,
    window: int,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """`minference::attention`, which is dense, and its log-sum-exps [B, H, Nq] in fp32."""
    mask = AttentionMask(causal, query_offset, window, key_mask)
    inputs = AttentionInputs(query, key, value, mask, scale, softcap, sink_logits=sinks)
    lowering = choose_lowering(inputs)
    try:
        return dense_attention_lse(lowering, inputs)
    except Exception as error:
        contain(error, f"a kernel of dense attention ({lowering.name})")
    return plain_attention_lse(inputs)


def fake_attention_lse(
    query: Tensor, key: Tensor, value: Tensor, *rest: object
) -> tuple[Tensor, Tensor]:
    """Tensors as the ops return them."""
    return empty_output(query, value), empty_lse(query)


for name in ("sparse_attention_lse", "attention_lse"):
    fake_of(name)(fake_attention_lse)
