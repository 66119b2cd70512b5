"""Pooled keys and queries for the block estimators, by generated kernels.

Runs of positions are replaced by their means (templates/pool.py.jinja), which are then scored.
Letters: B batch, h heads asked for, H query heads, Hk kv heads, N positions, D head_dim, S runs of
keys that share a mean.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import query_mask
from mpass.lowering.triton.attention import LOG2_E, mask_bytes
from mpass.lowering.triton.interpret import interpreted, upcast
from mpass.lowering.triton.launch import (
    DTYPES,
    device_ints,
    launch,
    row_major,
    strides,
    target_for,
)
from mpass.lowering.triton.spec import TritonKernelSpec, score_warps


def kernel_inputs(inputs: EstimateInputs) -> EstimateInputs:
    """The inputs as the kernels read them: rows contiguous; fp32 where interpreted."""
    query, key = inputs.query, inputs.key
    if interpreted(query.device):
        query, key = upcast(query), upcast(key)
    return replace(inputs, query=row_major(query), key=row_major(key))


def pooled_keys(key: Tensor, mask: AttentionMask, size: int) -> tuple[Tensor, Tensor]:
    """Means of runs of `size` keys of every kv head, in the keys' dtype; see `pooled_means`.

    Whole blocks are covered: runs beyond the last key have no keys.
    """
    every = device_ints(range(key.shape[1]), key.device)
    return pooled_means(key, every, size, mask, dtype=key.dtype)


def pooled_means(
    rows: Tensor,
    heads: Tensor,
    size: int,
    mask: AttentionMask,
    *,
    offset: int = 0,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Mean of each run of `size` positions, and how many it has, as a logarithm.

    rows [B, H, N, D] -> [B, h, S, D] of `dtype` and fp32 [B, h, S]: log2 of the count, negative for
    none. heads: int32 [h] on the device; size: a divisor or a multiple of BLOCK; offset: absolute
    position of the first row. Padding does not count where the mask tells of these rows.
    """
    batch, _, length, dim = rows.shape
    padding = mask.key_mask is not None and mask.key_mask.shape[1] >= offset + length
    per_program = max(size, BLOCK)
    programs = -(-(offset + length) // per_program) - offset // per_program
    means = torch.empty(
        batch, len(heads), programs * (per_program // size), dim, dtype=dtype, device=rows.device
    )
    weights = torch.empty(means.shape[:-1], device=rows.device)
    launch(
        TritonKernelSpec(
            template="pool",
            dtype=DTYPES[rows.dtype],
            head_dim=dim,
            pool=min(size, BLOCK),
            padding=padding,
            target=target_for(rows.device),
        ),
        "pool_runs",
        (programs, len(heads), batch),
        means=means,
        weights=weights,
        rows=rows,
        heads=heads,
        key_mask=mask_bytes(mask, heads) if padding else heads,
        stride_b=rows.stride(0),
        stride_h=rows.stride(1),
        stride_n=rows.stride(2),
        num_rows=length,
        num_keys=mask.key_mask.shape[1] if mask.key_mask is not None else 0,
        size=per_program,
        offset=offset,
    )
    return means, weights


def score_arguments(
    template: str,
    inputs: EstimateInputs,
    means: Tensor,
    weights: Tensor,
    heads: Tensor,
    **values: Any,
) -> tuple[TritonKernelSpec, dict[str, Any]]:
    """The kernel that scores means for query rows, and what it reads whatever the rows.

    means [B, Hk, S, D] and weights [B, Hk, S] of `pooled_keys`; heads: int32 [h] on the device.
    """
    query, mask = inputs.query, inputs.mask
    padding = query_mask(mask, query.shape[2]) is not None
    spec = TritonKernelSpec(
        template=template,
        dtype=DTYPES[query.dtype],
        head_dim=query.shape[-1],
        causal=mask.causal,
        window=mask.window > 0,
        padding=padding,
        num_warps=score_warps(query.shape[-1]),
        num_stages=2,
        target=target_for(query.device),
        **values,
    )
    return spec, {
        "query": query,
        "means": means,
        "weights": weights,
        "key_mask": mask_bytes(mask, heads) if padding else heads,
        "heads": heads,
        **strides("query", query),
        "num_queries": inputs.num_queries,
        "num_keys": inputs.num_keys,
        "num_kv_heads": inputs.key.shape[1],
        "group": inputs.group,
        "num_runs": means.shape[2],
        "query_offset": mask.query_offset,
        "window": mask.window,
        "scale": inputs.scale * LOG2_E,
    }
