"""Sparse attention as functions, shaped like torch's own: for those who want only the attention."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal, overload

import torch
from torch import Tensor

import mpass.lowering.key_bias  # noqa: F401  (defines minference::with_key_bias)
from mpass.config.heads import heads_of
from mpass.config.layer import PatternLike, as_pattern
from mpass.config.operands import (
    attention_mask,
    check_bias,
    check_most_lost,
    check_numbers,
    checked_sinks,
)
from mpass.errors import (
    ShapeError,
    TooLargeError,
)
from mpass.lowering import density as densities
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import attention as reference
from mpass.patterns.base import Pattern, attend_heads, attend_heads_lse, shared_slots

MAX_MASK_BYTES = 2 << 30
"""`computed_mask` refuses to make a larger one; making it takes a few times as much."""


DENSE_ABOVE = 0.6
"""Share of the dense work above which `attend` runs dense attention, as the backend does."""


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    patterns: PatternLike | Sequence[PatternLike],
    query_offset: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    window: int = 0,
    dense_above: float = DENSE_ABOVE,
    layer: int = -1,
    most_lost: float = 1.0,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    patterns: PatternLike | Sequence[PatternLike],
    query_offset: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    window: int = 0,
    dense_above: float = DENSE_ABOVE,
    layer: int = -1,
    most_lost: float = 1.0,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    patterns: PatternLike | Sequence[PatternLike],
    query_offset: int | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    key_mask: Tensor | None = None,
    key_bias: Tensor | None = None,
    window: int = 0,
    dense_above: float = DENSE_ABOVE,
    layer: int = -1,
    most_lost: float = 1.0,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute causal attention now, as the backend does in a graph, with a pattern per head.

    It is the call for engines that run a layer's attention themselves. B is the batch, H the number
    of query heads, Hk that of key and value heads, Nq and Nk are the numbers of queries and keys, D
    is the head_dim and Dv the size of a value. The result is [B, H, Nq, Dv], laid out in memory as
    [B, Nq, H, Dv].

    query: [B, H, Nq, D], in float32, bfloat16 or float16; views of any strides, as all inputs.
    key: [B, Hk, Nk, D], where Hk divides H.
    value: [B, Hk, Nk, Dv].
    patterns: a pattern for all heads, or a sequence with one per query head; each an object or
        text: `a_shape`, `a_shape(64, 128)`.
    query_offset: the number of keys before the first query; needed where Nq is not Nk. Keys after
        the last query are not looked at.
    scale: the factor of the scores; 1 / sqrt(D) by default.
    softcap: scores become softcap * tanh(score / softcap) if it is above 0.
    sinks: float [H], one more logit per head, which takes part in the softmax and has no value.
    key_mask: bool [B, Nk], False for padding.
    key_bias: float [B or 1, H or Hk or 1, Nk], added to the scaled scores of each key, before a
        softcap. ALiBi is slope * position of the key: a row's own position changes no weight.
    window: the sliding window in tokens, a query's own included; 0 for none.
    dense_above: dense attention runs where more than this share of the dense work is selected, or
        where it is faster as measured; 1 or more for never. On GPUs, whose host reads no index,
        what an earlier call of the same layer selected decides.
    layer: its number, for records, messages and what is remembered; -1 is an unknown one, of which
        nothing is remembered.
    most_lost: the share of a head's attention that may be lost, above 0; 1 for all. Up to 16 query
        rows are weighed exactly before, and a head that loses more of them keeps every key. It is
        not told together with `return_lse`.
    return_lse: return the log-sum-exps as well, fp32 [B, H, Nq]: the natural logarithm of the sum
        of e^score over the keys that were computed, sinks included, with scores scaled and capped;
        minus infinity for a row without any. Attentions over parts of the keys are joined by them.

    As in a compiled model, attention of a single query and of a layer whose heads are all dense is
    dense without an estimation. So is what a GPU's kernels do not serve, unless `dense_above` is 1
    or more. The caller decides from which lengths on sparse attention is asked for at all.

    Nothing makes the host wait for a GPU. Under torch.compile the call is traced into the ops that
    it runs; torch 2.11 takes patterns as text alone there.

    Raises ShapeError, DtypeError, DeviceError, TensorTypeError, GradientError, ArgumentError,
    OptionValueError, PatternValueError and UnknownPatternError before anything is computed.
    """
    mask = attention_mask(query, key, value, True, True, query_offset, window, key_mask)
    check_numbers(scale, softcap, dense_above, layer)
    check_most_lost(most_lost, return_lse)
    if sinks is not None:
        sinks = checked_sinks(sinks, query)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if key_bias is not None:
        check_bias(key_bias, query, key)
        given = (query, key, key_bias[:, :, None], 1.0, scale, False)
        query, key = torch.ops.minference.with_key_bias.default(*given)
    kv_group = query.shape[1] // key.shape[1]
    heads = heads_of(patterns, query.shape[1], layer, kv_group=kv_group)
    end = mask.query_offset + query.shape[2]
    if end != key.shape[2]:
        key, value = key[:, :, :end], value[:, :, :end]
        if key_mask is not None:
            mask = dataclasses.replace(mask, key_mask=key_mask[:, :end])
    if query.shape[2] == 1 or (heads.all_dense and window == 0):
        ops = torch.ops.minference
        dense = ops.attention_lse.default if return_lse else ops.attention.default
        result: Tensor | tuple[Tensor, Tensor] = dense(
            *(query, key, value, mask.key_mask, sinks, mask.query_offset, window, True),
            *(scale, float(softcap)),
        )
        return result
    # As in graphs: dense attention with a softcap or sinks is slower than lowerings take it to be.
    remembered = layer >= 0 and softcap == 0 and sinks is None
    numbers: dict[str, Any] = {"scale": scale, "softcap": float(softcap), "sinks": sinks}
    numbers |= {"dense_above": float(dense_above), "layer": layer}
    numbers |= {"site": 1 + layer if remembered else 0}
    if return_lse:
        return attend_heads_lse(query, key, value, heads, mask, **numbers)
    return attend_heads(query, key, value, heads, mask, most_lost=float(most_lost), **numbers)


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern | str,
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    query_offset: int | None = None,
    window: int = 0,
    key_mask: Tensor | None = None,
    return_lse: Literal[False] = False,
) -> Tensor: ...


@overload
def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern | str,
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    query_offset: int | None = None,
    window: int = 0,
    key_mask: Tensor | None = None,
    return_lse: Literal[True],
) -> tuple[Tensor, Tensor]: ...


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    pattern: Pattern | str,
    scale: float | None = None,
    is_causal: bool = True,
    enable_gqa: bool = False,
    query_offset: int | None = None,
    window: int = 0,
    key_mask: Tensor | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Compute attention over the keys that `pattern` selects for every head: [B, H, Nq, Dv].

    B is the batch, H the number of query heads, Hk that of key and value heads, Nq and Nk are the
    numbers of queries and keys, D is the head_dim and Dv the size of a value.

    query: [B, H, Nq, D], in float32, bfloat16 or float16.
    key: [B, Hk, Nk, D], where Hk divides H.
    value: [B, Hk, Nk, Dv].
    pattern: a pattern, or text: `a_shape`, `a_shape(64, 128)`.
    scale: the factor of the scores; 1 / sqrt(D) by default.
    is_causal: whether a query sees no key after its own position.
    enable_gqa: must be True where H is larger than Hk, as in torch.
    query_offset: the number of keys before the first query; needed where Nq is not Nk.
    window: the sliding window in tokens, a query's own included; 0 for none.
    key_mask: bool [B, Nk], False for padding.
    return_lse: return the log-sum-exps [B, H, Nq] as well, as `attend` does.

    Raises ShapeError, DtypeError, TensorTypeError, GradientError, OptionValueError,
    PatternValueError and UnknownPatternError before anything is computed.
    """
    mask = attention_mask(query, key, value, is_causal, enable_gqa, query_offset, window, key_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    chosen = causal_or_defined(as_pattern(pattern), mask)
    kv_group = query.shape[1] // key.shape[1]
    heads = heads_of(chosen, query.shape[1], kv_group=kv_group)
    run = attend_heads_lse if return_lse else attend_heads
    return run(query, key, value, heads, mask, scale=scale, dense_above=1.0)


def computed_mask(
    query: Tensor,
    key: Tensor,
    *,
    pattern: Pattern | str,
    scale: float | None = None,
    is_causal: bool = True,
    query_offset: int | None = None,
    window: int = 0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Tell what the kernels really compute, cell by cell: bool [B, H, Nq, Nk], for small N only.

    It contains the pattern's selected set, and `sparse_attention` equals dense attention under it.
    The parameters and errors are those of `sparse_attention`; TooLargeError where the mask would
    take more than MAX_MASK_BYTES.
    """
    mask = attention_mask(query, key, key, is_causal, True, query_offset, window, key_mask)
    size = query.shape[0] * query.shape[1] * query.shape[2] * key.shape[2]
    if size > MAX_MASK_BYTES:
        remedy = "give it fewer tokens or heads, or ask mpass.density for the share of the cells"
        raise TooLargeError(
            f"a mask of {query.shape[2]} x {key.shape[2]} tokens", size, MAX_MASK_BYTES, remedy
        )
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return reference.computed_mask(
        estimate_index(query, key, mask, pattern, scale),
        mask,
        batch=query.shape[0],
        num_queries=query.shape[2],
        num_keys=key.shape[2],
    )


def density(
    query: Tensor,
    key: Tensor,
    *,
    pattern: Pattern | str,
    scale: float | None = None,
    is_causal: bool = True,
    query_offset: int | None = None,
    window: int = 0,
    key_mask: Tensor | None = None,
) -> Tensor:
    """Tell which share of dense attention under the same mask is computed: fp64 [B, H].

    The parameters and errors are those of `sparse_attention`.
    """
    mask = attention_mask(query, key, key, is_causal, True, query_offset, window, key_mask)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return densities.density(
        estimate_index(query, key, mask, pattern, scale),
        mask,
        batch=query.shape[0],
        num_queries=query.shape[2],
        num_keys=key.shape[2],
    )


def estimate_index(
    query: Tensor, key: Tensor, mask: AttentionMask, pattern: Pattern | str, scale: float
) -> SparseIndex:
    """The index of one pattern for all heads."""
    chosen = causal_or_defined(as_pattern(pattern), mask)
    heads = list(range(query.shape[1]))
    patterns = [chosen] * len(heads)
    index = type(chosen).estimate(EstimateInputs(query, key, mask, heads, scale), patterns)
    return dataclasses.replace(index, head_slots=shared_slots(patterns, index.head_slots))


def causal_or_defined(pattern: Pattern, mask: AttentionMask) -> Pattern:
    """The pattern, if it is defined under the mask; raises ShapeError."""
    if not mask.causal and not pattern.bidirectional:
        raise ShapeError(f"{pattern.name} is defined for causal attention only: is_causal is False")
    return pattern
