"""Every generated kernel against the reference on the device itself, outputs poisoned first."""

from __future__ import annotations

from typing import Any

import torch
from mpass.lowering import estimate as estimate_reference
from mpass.lowering import reference
from mpass.lowering import triton as lowering
from mpass.lowering.index import AttentionMask, SparseIndex, join_indexes

TOLERANCE = {torch.bfloat16: 2e-2, torch.float16: 4e-3, torch.float32: 1e-5}
"""Largest difference to the fp64 truth, inputs of unit variance."""

FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "window": {"window": 200},
    "padding": {"padding": True},
    "offset": {"offset": 37},
    "softcap and sinks": {"softcap": 20.0, "sinks": True},
    "bidirectional": {"causal": False},
    "all": {"window": 300, "padding": True, "offset": 100, "softcap": 20.0, "sinks": True},
}


def check_layer(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    *,
    length: int,
    window: int = 0,
    padding: bool = False,
    offset: int = 0,
    causal: bool = True,
    softcap: float = 0.0,
    sinks: bool = False,
) -> dict[str, Any]:
    """One layer of all kinds of heads: estimation and attention, each against its reference.

    Estimation is compared by the sets it selects: rounding may swap entries of nearly equal score,
    so that `agreement` (share of the reference's entries found) is asked to be 0.98, not 1.
    """
    generator = torch.Generator(device).manual_seed(length + head_dim)

    def normal(heads: int, rows: int) -> torch.Tensor:
        size = (2, heads, rows, head_dim)
        return torch.randn(size, generator=generator, device=device).to(dtype)

    heads, kv_heads, num_keys = 8, 2, length + offset
    query, key, value = (
        normal(heads, length),
        normal(kv_heads, num_keys),
        normal(kv_heads, num_keys),
    )
    key_mask = None
    if padding:
        key_mask = torch.ones(2, num_keys, dtype=torch.bool, device=device)
        key_mask[0, : num_keys // 3] = False
        key_mask[1, num_keys - num_keys // 5 :] = False
    mask = AttentionMask(causal, offset, window, key_mask)
    scale = head_dim**-0.5
    slashes: dict[str, Any] = {
        "scale": scale,
        "vertical_sizes": [40, 100, 300, 64],
        "slash_sizes": [100, 130, 200, 164],
    }
    blocks: dict[str, Any] = {"top_k": [1, 2, 4, 3], "block_sizes": [64, 64, 128, 64]}
    by_slash, by_block = [0, 2, 4, 6], [1, 3, 5, 7]
    with poisoned_memory():
        parts = [
            lowering.vertical_slash_index(query, key, mask, by_slash, **slashes),
            lowering.block_top_k_index(query, key, mask, by_block, **blocks),
        ]
        index = join_indexes(parts, [by_slash, by_block])
        logits = torch.linspace(-1, 1, heads, device=device) if sinks else None
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "sinks": logits}
        out = lowering.sparse_attention(query, key, value, index, mask, **options)
    expected = [
        estimate_reference.vertical_slash_index(query, key, mask, by_slash, **slashes),
        estimate_reference.block_top_k_index(query, key, mask, by_block, **blocks),
    ]
    agreement = min(
        overlap(a, b, mask, batch=2, num_queries=length, num_keys=num_keys)
        for a, b in zip(parts, expected, strict=True)
    )
    wide = (query.double(), key.double(), value.double())
    truth = reference.sparse_attention(*wide, index, mask, **options)
    error = float((out.double() - truth).abs().max())
    good = error < TOLERANCE[dtype] and agreement >= 0.98
    return {"error": error, "agreement": agreement, "ok": bool(good)}


def overlap(
    index: SparseIndex,
    expected: SparseIndex,
    mask: AttentionMask,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> float:
    """Share of the cells that `expected` computes which `index` computes too."""
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    got = reference.computed_mask(index, mask, **sizes)
    wanted = reference.computed_mask(expected, mask, **sizes)
    return float((got & wanted).sum() / wanted.sum().clamp(min=1))


class poisoned_memory:
    """torch.empty gives NaN and the largest integers: what a kernel forgets to write shows."""

    def __enter__(self) -> None:
        self.before = torch.are_deterministic_algorithms_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)

    def __exit__(self, *error: object) -> None:
        torch.use_deterministic_algorithms(self.before)
