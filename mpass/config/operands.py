"""Checks of the tensors and numbers that the functional interface is given, before any work."""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.errors import (
    ArgumentError,
    DeviceError,
    DtypeError,
    GradientError,
    ShapeError,
    TensorTypeError,
)
from mpass.lowering.index import AttentionMask

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the ops compute in; the accumulator is fp32."""


def check_numbers(scale: object, softcap: object, dense_above: object, layer: object) -> None:
    """Raise ArgumentError unless the numbers of `attend` are what they must be."""
    least = (("softcap", softcap, "0 for none"), ("dense_above", dense_above, "0"))
    if scale is not None and (isinstance(scale, bool) or not isinstance(scale, int | float)):
        raise ArgumentError("scale", scale, "a float, or None for 1 / sqrt(D)")
    for name, number, zero in least:
        if isinstance(number, bool) or not isinstance(number, int | float) or not number >= 0:
            raise ArgumentError(name, number, f"{zero}, or a larger number")
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise ArgumentError("layer", layer, "the number of a layer, or -1 for an unknown one")


def check_most_lost(most_lost: object, return_lse: bool) -> None:
    """Raise ArgumentError for a share that is none, or one beside log-sum-exps."""
    if isinstance(most_lost, bool) or not isinstance(most_lost, int | float):
        raise ArgumentError("most_lost", most_lost, "a number")
    if not 0 < most_lost <= 1:
        raise ArgumentError("most_lost", most_lost, "a share above 0, or 1 for no limit")
    if return_lse and most_lost != 1:
        raise ArgumentError("most_lost", most_lost, "1 where return_lse is true")


def checked_sinks(sinks: Tensor, query: Tensor) -> Tensor:
    """One logit per query head, one after the other in memory, as kernels read them."""
    if not isinstance(sinks, Tensor):
        raise TensorTypeError("sinks", sinks)
    if sinks.requires_grad and torch.is_grad_enabled():
        raise GradientError("sinks")
    if sinks.shape != query.shape[1:2] or not sinks.dtype.is_floating_point:
        raise ShapeError(
            f"sinks are {sinks.dtype} {list(sinks.shape)}; expected a float per query head, "
            f"{[query.shape[1]]}"
        )
    if sinks.device != query.device:
        raise DeviceError(sinks.device, f"the query's, {query.device}, for sinks")
    return sinks.contiguous()


def check_bias(bias: object, query: Tensor, key: Tensor) -> None:
    """Raise unless a bias per key is one: a float for each key, of a head or of all."""
    if not isinstance(bias, Tensor):
        raise TensorTypeError("key_bias", bias)
    if bias.requires_grad and torch.is_grad_enabled():
        raise GradientError("key_bias")
    (batch, heads), (kv_heads, num_keys) = query.shape[:2], key.shape[1:3]
    fits = bias.dim() == 3 and bias.shape[0] in (1, batch) and bias.shape[2] == num_keys
    if not fits or bias.shape[1] not in (1, kv_heads, heads) or not bias.is_floating_point():
        raise ShapeError(
            f"key_bias is {bias.dtype} {list(bias.shape)}; expected a float of [B or 1, H or Hk "
            f"or 1, Nk], here {[batch, heads, num_keys]}"
        )
    if bias.device != query.device:
        raise DeviceError(bias.device, f"the query's, {query.device}, for key_bias")


def attention_mask(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    is_causal: bool,
    enable_gqa: bool,
    query_offset: int | None,
    window: int,
    key_mask: Tensor | None,
) -> AttentionMask:
    """The mask that the arguments mean, after checking every shape and dtype."""
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, Tensor):
            raise TensorTypeError(name, tensor)
        if tensor.requires_grad and torch.is_grad_enabled():
            raise GradientError(name)
        if tensor.dim() != 4:
            raise ShapeError(f"{name} is {list(tensor.shape)}; expected [B, H, N, D]")
        if tensor.dtype not in (*DTYPES, torch.float64):
            raise DtypeError(tensor.dtype, "float32, bfloat16, float16")
        if tensor.device != query.device:
            raise DeviceError(tensor.device, f"the query's, {query.device}, for {name}")
        if tensor.dtype != query.dtype:
            raise DtypeError(tensor.dtype, f"the query's, {query.dtype}, for {name}")
    batch, heads, num_queries, head_dim = query.shape
    kv_heads, num_keys = key.shape[1], key.shape[2]
    if key.shape[0] != batch or value.shape[:3] != key.shape[:3] or key.shape[3] != head_dim:
        raise ShapeError(
            f"query {list(query.shape)}, key {list(key.shape)} and value {list(value.shape)} do "
            "not make an attention: batch and head_dim must agree, key and value share B, H and N"
        )
    if min(batch, heads, kv_heads, num_queries, num_keys, head_dim) < 1:
        raise ShapeError(f"query {list(query.shape)}, key {list(key.shape)}: a size is zero")
    if heads % kv_heads:
        raise ShapeError(f"{heads} query heads do not divide into groups over {kv_heads} kv heads")
    if heads != kv_heads and not enable_gqa:
        raise ShapeError(
            f"{heads} query heads over {kv_heads} kv heads: pass enable_gqa=True if that is meant"
        )
    for name, number in (("query_offset", query_offset), ("window", window)):
        if isinstance(number, Tensor):  # reading it would make the host wait for a GPU
            raise ArgumentError(name, number, "an int: lengths are known to the host")
    if window < 0:
        raise ShapeError(f"window is {window}; allowed: 0 for none, or a number of tokens")
    if key_mask is not None and not isinstance(key_mask, Tensor):
        raise TensorTypeError("key_mask", key_mask)
    if key_mask is not None and (
        key_mask.shape != (batch, num_keys) or key_mask.dtype != torch.bool
    ):
        raise ShapeError(
            f"key_mask is {key_mask.dtype} {list(key_mask.shape)}; "
            f"expected bool {[batch, num_keys]}"
        )
    if key_mask is not None and key_mask.device != query.device:
        raise DeviceError(key_mask.device, f"the query's, {query.device}, for key_mask")
    if not is_causal:
        if query_offset or window:
            raise ShapeError("query_offset and window need is_causal=True")
        return AttentionMask(causal=False, key_mask=key_mask)
    if query_offset is None:
        if num_queries != num_keys:
            raise ShapeError(
                f"{num_queries} queries over {num_keys} keys: pass query_offset, the number of "
                f"keys before the first query (usually {num_keys - num_queries})"
            )
        query_offset = 0
    if query_offset < 0 or query_offset + num_queries > num_keys:
        raise ShapeError(
            f"query_offset {query_offset} with {num_queries} queries over {num_keys} keys; "
            f"allowed: 0 to {num_keys - num_queries}"
        )
    return AttentionMask(True, query_offset, window, key_mask)
