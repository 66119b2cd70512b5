"""The truth that kernels are held against: dense attention in fp64 over an explicit mask."""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference import attention as reference

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-10}
"""Largest difference to the fp64 truth for inputs of unit variance."""


def dense_attention(
    query: Tensor, key: Tensor, value: Tensor, cells: Tensor, scale: float
) -> Tensor:
    """fp64 attention over bool cells [B, H, Nq, Nk]; rows that see nothing are zero."""
    group = query.shape[1] // key.shape[1]
    keys = key.double().repeat_interleave(group, 1)
    values = value.double().repeat_interleave(group, 1)
    scores = (query.double() @ keys.mT * scale).masked_fill(~cells, -torch.inf)
    return torch.softmax(scores, -1).nan_to_num(0.0) @ values


def dense_gradients(inputs: AttentionInputs, cells: Tensor, grad_out: Tensor) -> list[Tensor]:
    """fp64 gradients of query, key, value and sinks, by autograd over cells [B, H, Nq, Nk]."""
    leaves = [inputs.query, inputs.key, inputs.value]
    leaves += [] if inputs.sink_logits is None else [inputs.sink_logits]
    leaves = [leaf.detach().double().requires_grad_() for leaf in leaves]
    heads = inputs.query.shape[1]
    query, keys, values = leaves[0], *(reference.repeat_kv(t, heads) for t in leaves[1:3])
    scores = query @ keys.mT * inputs.scale
    if inputs.softcap:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    weights = reference.masked_softmax(scores, cells, leaves[3] if len(leaves) > 3 else None)
    return list(torch.autograd.grad(weights @ values, leaves, grad_out.double()))


def random_attention(
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 2,
    num_queries: int = 200,
    num_keys: int | None = None,
    head_dim: int = 32,
    value_dim: int | None = None,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Random query, key, value of unit variance."""
    generator = torch.Generator().manual_seed(seed)
    num_keys = num_queries if num_keys is None else num_keys

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    return (
        normal(batch, heads, num_queries, head_dim),
        normal(batch, kv_heads, num_keys, head_dim),
        normal(batch, kv_heads, num_keys, value_dim or head_dim),
    )
