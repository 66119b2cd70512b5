"""Pooled keys and queries for the block estimators, by generated kernels.

Runs of positions are replaced by their means (templates/pool.py.jinja), which are then scored.
Letters: B batch, h heads asked for, H query heads, Hk kv heads, N positions, D head_dim, S runs of
keys that share a mean.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
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
from mpass.lowering.triton.spec import TritonKernelSpec, int8_dim, score_warps

CENTRE_ROWS = 1024
"""Rows that make the vector which is subtracted from means, at most; as of pool.py.jinja."""


@dataclass(frozen=True, slots=True)
class PooledKeys:
    """Means of runs of keys as kernels read them.

    means: [B, Hk, S, D] of the keys' dtype, or int8 with rows of `int8_dim` numbers; weights: fp32
    [B, Hk, S], log2 of how many keys a run has, negative for none; steps: fp32 [B, Hk, S], what 1
    is worth in a row of 8-bit means, else None.
    """

    means: Tensor
    weights: Tensor
    steps: Tensor | None = None

    def arguments(self) -> dict[str, Any]:
        """By the names that kernels have for them."""
        steps = {} if self.steps is None else {"steps": self.steps}
        return {"means": self.means, "weights": self.weights} | steps


def kernel_inputs(inputs: EstimateInputs) -> EstimateInputs:
    """The inputs as the kernels read them: rows contiguous; fp32 where interpreted."""
    query, key = inputs.query, inputs.key
    if interpreted(query.device):
        query, key = upcast(query), upcast(key)
    return replace(inputs, query=row_major(query), key=row_major(key))


def pooled_keys(key: Tensor, mask: AttentionMask, size: int, *, int8: bool = False) -> PooledKeys:
    """Means of runs of `size` keys of every kv head, in the keys' dtype or in 8-bit numbers.

    Whole blocks are covered: runs beyond the last key have no keys. Means in 8 bits are those of
    the keys less one vector per kv head, which softmax is invariant to: each row's products with
    the means all miss the same number.
    """
    every = device_ints(range(key.shape[1]), key.device)
    if not int8:
        return PooledKeys(*pooled_means(key, every, size, mask, dtype=key.dtype))
    batch, heads, length, dim = key.shape
    centre = torch.empty(batch, heads, int8_dim(dim), device=key.device)
    spec, common = pool_arguments(key, every, size, mask, int8=True)
    given = {name: value for name, value in common.items() if name not in ("size", "offset")}
    step = max(BLOCK, -(-length // CENTRE_ROWS))
    launch(spec, "find_centre", (heads, batch), centre=centre, step=step, **given)
    programs = -(-length // common["size"])
    runs = programs * (common["size"] // size)
    means = torch.empty(batch, heads, runs, int8_dim(dim), dtype=torch.int8, device=key.device)
    pooled = PooledKeys(
        means,
        torch.empty(batch, heads, runs, device=key.device),
        torch.empty(batch, heads, runs, device=key.device),
    )
    grid = (programs, heads, batch)
    launch(spec, "pool_runs", grid, centre=centre, **pooled.arguments(), **common)
    return pooled


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
    spec, common = pool_arguments(rows, heads, size, mask, offset=offset)
    per_program = common["size"]
    programs = -(-(offset + length) // per_program) - offset // per_program
    means = torch.empty(
        batch, len(heads), programs * (per_program // size), dim, dtype=dtype, device=rows.device
    )
    weights = torch.empty(means.shape[:-1], device=rows.device)
    grid = (programs, len(heads), batch)
    launch(spec, "pool_runs", grid, means=means, weights=weights, **common)
    return means, weights


def pool_arguments(
    rows: Tensor,
    heads: Tensor,
    size: int,
    mask: AttentionMask,
    *,
    offset: int = 0,
    int8: bool = False,
) -> tuple[TritonKernelSpec, dict[str, Any]]:
    """The kernel that makes means, and what it reads; as of `pooled_means`."""
    padding = mask.key_mask is not None and mask.key_mask.shape[1] >= offset + rows.shape[2]
    spec = TritonKernelSpec(
        template="pool",
        dtype=DTYPES[rows.dtype],
        head_dim=rows.shape[3],
        pool=min(size, BLOCK),
        int8=int8,
        padding=padding,
        target=target_for(rows.device),
    )
    return spec, {
        "rows": rows,
        "heads": heads,
        "key_mask": mask_bytes(mask, heads) if padding else heads,
        "stride_b": rows.stride(0),
        "stride_h": rows.stride(1),
        "stride_n": rows.stride(2),
        "num_rows": rows.shape[2],
        "num_keys": mask.key_mask.shape[1] if mask.key_mask is not None else 0,
        "size": max(size, BLOCK),
        "offset": offset,
    }


def score_arguments(
    template: str,
    inputs: EstimateInputs,
    pooled: PooledKeys,
    heads: Tensor,
    **values: Any,
) -> tuple[TritonKernelSpec, dict[str, Any]]:
    """The kernel that scores means for query rows, and what it reads whatever the rows.

    pooled: of `pooled_keys`; heads: int32 [h] on the device; values: more fields of the spec.
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
        target=target_for(query.device),
        **({"num_warps": score_warps(query.shape[-1]), "num_stages": 2} | values),
    )
    return spec, {
        "query": query,
        **pooled.arguments(),
        "key_mask": mask_bytes(mask, heads) if padding else heads,
        "heads": heads,
        **strides("query", query),
        "num_queries": inputs.num_queries,
        "num_keys": inputs.num_keys,
        "num_kv_heads": inputs.key.shape[1],
        "group": inputs.group,
        "num_runs": pooled.means.shape[2],
        "query_offset": mask.query_offset,
        "window": mask.window,
        "scale": inputs.scale * LOG2_E,
    }
