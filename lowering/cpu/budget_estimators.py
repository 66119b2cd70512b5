"""Index estimators by generated C++; the meaning is mpass.lowering.reference.vertical_slash."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.cpu.arguments import EstimateArguments, pointer, rows_contiguous, strides
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import estimate_spec
from mpass.lowering.index import (
    AttentionMask,
    SparseIndex,
    diagonal_slots,
    empty_index,
    list_slots,
    num_query_blocks,
)
from mpass.lowering.reference.vertical_slash import block_top_k_width, vertical_slash_width


def vertical_slash_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    scale: float,
    vertical_sizes: Sequence[int],
    slash_sizes: Sequence[int],
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """Columns and diagonals with the most attention of the last queries (MInference, section 3.2).

    query [B, H, Nq, D], key [B, Hk, Nk, D]; vertical_sizes and slash_sizes: keys and token
    diagonals to keep, one number per head of `heads`. spec: a specialisation to use.
    """
    width = vertical_slash_width(vertical_sizes, slash_sizes)
    blocks = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, blocks, width, diagonal_slots(len(heads)))
    run_estimator(
        "vertical_slash_index",
        spec or estimate_spec(query),
        (query, key),
        mask,
        heads,
        sizes=(vertical_sizes, slash_sizes),
        outputs=(
            index.column_count,
            index.column_index,
            index.diagonal_count,
            index.diagonal_index,
        ),
        scale=scale,
    )
    return index


def block_top_k_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    top_k: Sequence[int],
    block_sizes: Sequence[int],
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """The blocks of largest mean-pooled score, per query block (MInference, section 3.2).

    query [B, H, Nq, D], key [B, Hk, Nk, D]; block_sizes: positions per pooled block, multiples of
    BLOCK, and top_k: pooled blocks to keep, one number per head. spec: a specialisation to use.
    """
    width = block_top_k_width(top_k, block_sizes)
    blocks = num_query_blocks(query.shape[2], mask.query_offset)
    index = empty_index(query, blocks, width, list_slots(len(heads)))
    run_estimator(
        "block_top_k_index",
        spec or estimate_spec(query),
        (query, key),
        mask,
        heads,
        sizes=(top_k, block_sizes),
        outputs=(index.block_count, index.block_index, None, None),
        scale=1.0,
    )
    return index


def run_estimator(
    name: str,
    spec: KernelSpec,
    inputs: tuple[Tensor, Tensor],
    mask: AttentionMask,
    heads: Sequence[int],
    *,
    sizes: tuple[Sequence[int], Sequence[int]],
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    scale: float,
) -> None:
    """Call one estimator of a library; fills `outputs` (see EstimateArguments)."""
    query, key = (rows_contiguous(tensor) for tensor in inputs)
    key_mask = None if mask.key_mask is None else mask.key_mask.contiguous().view(torch.uint8)
    numbers = torch.tensor(
        [list(heads), list(sizes[0]), list(sizes[1])], dtype=torch.int32, device="cpu"
    )
    first_count, first_index, second_count, second_index = outputs
    if query.shape[0] == 0 or not heads or 0 in (query.shape[2], key.shape[2]):
        return
    arguments = EstimateArguments(
        query=pointer(query),
        key=pointer(key),
        key_mask=pointer(key_mask),
        heads=pointer(numbers[0]),
        first_sizes=pointer(numbers[1]),
        second_sizes=pointer(numbers[2]),
        first_count=pointer(first_count),
        first_index=pointer(first_index),
        second_count=pointer(second_count),
        second_index=pointer(second_index),
        batch=query.shape[0],
        num_heads=len(heads),
        group=query.shape[1] // key.shape[1],
        kv_heads=key.shape[1],
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        num_blocks=num_query_blocks(query.shape[2], mask.query_offset),
        first_width=first_index.shape[-1],
        second_width=0 if second_index is None else second_index.shape[-1],
        query_offset=mask.query_offset,
        window=mask.window,
        causal=mask.causal,
        threads=torch.get_num_threads(),
        scale=scale,
        **strides("query", query),
        **strides("key", key),
    )
    if load_library(spec)[name](ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory to estimate an index over keys {tuple(key.shape)}")
