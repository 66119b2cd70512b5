"""The Triton lowering: generated GPU kernels behind the functions that every lowering has.

A `KernelSpec` (spec.py) becomes source (source.py, templates/), a module (source.load) and a launch
(launch.py). Triton itself is imported by the first call, never by importing this package.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.reference.block_scores import TileRule
from mpass.lowering.reference.flex_prefill import FlexRule
from mpass.lowering.reference.sample_attention import SampledRule
from mpass.lowering.reference.union import UnionRule
from mpass.lowering.reference.x_attention import AntidiagonalRule

MAX_HEADS = 65535
"""Query heads and batch rows lie on grid axes of this size."""


def unsupported(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> str | None:
    """Why the Triton kernels cannot serve these tensors, in words; None if they can.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv]. Reads dtype, device and static
    shapes only. softcap and sinks are served whatever they are.
    """
    from mpass.lowering.triton.spec import HEAD_DIMS

    if query.device.type != "cuda":
        return f"Triton kernels run on a GPU, not on {query.device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "Triton kernels need compute capability 8.0 (Ampere) or later"
    names = {str(t.dtype).removeprefix("torch.") for t in (query, key, value)}
    if names not in ({"bfloat16"}, {"float16"}):
        return (
            f"Triton kernels take bfloat16 or float16, not {' with '.join(sorted(names))}: "
            "float32 would run through TF32 and lose 13 bits; cast, or use torch.autocast"
        )
    for name, dim in (("head_dim", query.shape[-1]), ("value dim", value.shape[-1])):
        if dim not in HEAD_DIMS:
            return f"{name} {dim} is outside of {HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}"
    if query.shape[1] > MAX_HEADS or query.shape[0] > MAX_HEADS:
        return f"more than {MAX_HEADS} heads or batch rows"
    return None


def sparse_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex,
    mask: AttentionMask,
    *,
    scale: float,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Tensor:
    """As mpass.lowering.reference.attention.sparse_attention, by a generated kernel."""
    from mpass.lowering.triton import attention

    return attention.sparse_attention(
        query, key, value, index, mask, scale=scale, softcap=softcap, sinks=sinks
    )


def vertical_slash_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    scale: float,
    vertical_sizes: Sequence[int],
    slash_sizes: Sequence[int],
) -> SparseIndex:
    """As mpass.lowering.reference.vertical_slash.vertical_slash_index, by generated kernels."""
    from mpass.lowering.triton import vertical_slash as estimate

    return estimate.vertical_slash_index(
        query,
        key,
        mask,
        heads,
        scale=scale,
        vertical_sizes=vertical_sizes,
        slash_sizes=slash_sizes,
    )


def block_top_k_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    top_k: Sequence[int],
    block_sizes: Sequence[int],
) -> SparseIndex:
    """As mpass.lowering.reference.vertical_slash.block_top_k_index, by generated kernels."""
    from mpass.lowering.triton import block_scores as blocks

    return blocks.block_top_k_index(query, key, mask, heads, top_k=top_k, block_sizes=block_sizes)


def tile_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[TileRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.block_scores.tile_index, by generated kernels."""
    from mpass.lowering.triton import block_scores as blocks

    return blocks.tile_index(query, key, mask, heads, rules, scale=scale)


def union_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[UnionRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.union.union_index, by generated kernels."""
    from mpass.lowering.triton import block_scores as blocks

    return blocks.union_index(query, key, mask, heads, rules, scale=scale)


def antidiagonal_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[AntidiagonalRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.x_attention.antidiagonal_index, by generated kernels."""
    from mpass.lowering.triton import x_attention as antidiagonal

    return antidiagonal.antidiagonal_index(query, key, mask, heads, rules, scale=scale)


def sampled_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[SampledRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.sample_attention.sampled_index, by generated kernels."""
    from mpass.lowering.triton import sample_attention as sampled

    return sampled.sampled_index(query, key, mask, heads, rules, scale=scale)


def flex_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[FlexRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.flex_prefill, by batched ops and a generated kernel."""
    from mpass.lowering.triton import flex_prefill as flex

    return flex.flex_index(query, key, mask, heads, rules, scale=scale)


__all__ = [
    "antidiagonal_index",
    "block_top_k_index",
    "flex_index",
    "sampled_index",
    "sparse_attention",
    "tile_index",
    "union_index",
    "unsupported",
    "vertical_slash_index",
]
