"""Lists of key blocks and single keys by generated C++; the meaning is lowering.estimate_*.

One call of a generated library per index, whatever the rules of its heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.cpu.arguments import pointer, rows_contiguous, strides
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.list_arguments import list_arguments, rule_fields
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import estimate_spec
from mpass.lowering.index import (
    AttentionMask,
    IndexWidth,
    SparseIndex,
    empty_index,
    list_slots,
    num_query_blocks,
)
from mpass.lowering.reference.block_scores import TileRule, tile_width
from mpass.lowering.reference.flex_prefill import FlexRule, flex_width
from mpass.lowering.reference.sample_attention import SampledRule, column_rule, window_index
from mpass.lowering.reference.union import UnionRule, union_width
from mpass.lowering.reference.x_attention import AntidiagonalRule, antidiagonal_width


def union_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[UnionRule],
    *,
    scale: float,
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """As `mpass.lowering.reference.union.union_index`; query [B, H, Nq, D], key [B, Hk, Nk, D].

    spec: a specialisation to use. Raises MemoryError if the means do not fit.
    """
    index = empty_lists(query, mask, len(heads), union_width(rules))
    run_estimator("union", index, query, key, mask, heads, rules, scale=scale, spec=spec)
    return index


def tile_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[TileRule],
    *,
    scale: float,
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """As `mpass.lowering.reference.block_scores.tile_index`; arguments as of `union_index`."""
    index = empty_lists(query, mask, len(heads), tile_width(rules))
    run_estimator("block_scores", index, query, key, mask, heads, rules, scale=scale, spec=spec)
    return index


def antidiagonal_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[AntidiagonalRule],
    *,
    scale: float,
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """As `mpass.lowering.reference.x_attention.antidiagonal_index`; arguments as `union_index`."""
    index = empty_lists(query, mask, len(heads), antidiagonal_width(rules))
    run_estimator("x_attention", index, query, key, mask, heads, rules, scale=scale, spec=spec)
    return index


def flex_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[FlexRule],
    *,
    scale: float,
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """As `mpass.lowering.reference.flex_prefill.flex_index`; arguments as of `union_index`."""
    index = empty_lists(query, mask, len(heads), flex_width(rules))
    run_estimator("flex_prefill", index, query, key, mask, heads, rules, scale=scale, spec=spec)
    return index


def sampled_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[SampledRule],
    *,
    scale: float,
    spec: KernelSpec | None = None,
) -> SparseIndex:
    """As mpass.lowering.reference.sample_attention; arguments as of `union_index`."""
    index = window_index(query, key, mask, rules)
    columns = [column_rule(rule, query.shape[2]) for rule in rules]
    run_estimator(
        "sample_attention", index, query, key, mask, heads, columns, scale=scale, spec=spec
    )
    return index


def empty_lists(
    query: Tensor, mask: AttentionMask, num_heads: int, width: IndexWidth
) -> SparseIndex:
    """An index in list form that an estimator is to fill."""
    num_blocks = num_query_blocks(query.shape[2], mask.query_offset)
    return empty_index(query, num_blocks, width, list_slots(num_heads))


def run_estimator(
    kernel: str,
    index: SparseIndex,
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[Any],
    *,
    scale: float,
    spec: KernelSpec | None,
) -> None:
    """Fill the lists and columns of an index by the kernel of that name, one rule per head."""
    if query.shape[0] == 0 or not heads or 0 in (query.shape[2], key.shape[2]):
        return
    query, key = rows_contiguous(query), rows_contiguous(key)
    key_mask = None if mask.key_mask is None else mask.key_mask.contiguous().view(torch.uint8)
    parameters = {
        name: torch.tensor(
            [getattr(rule, name) or 0 for rule in rules],
            dtype=torch.float32 if kind == "float" else torch.int32,
            device="cpu",
        )
        for name, kind in rule_fields(kernel).items()
    }
    parameters["heads"] = torch.tensor(list(heads), dtype=torch.int32, device="cpu")
    arguments = list_arguments(kernel)(
        query=pointer(query),
        key=pointer(key),
        key_mask=pointer(key_mask),
        block_count=pointer(index.block_count),
        block_index=pointer(index.block_index),
        column_count=pointer(index.column_count),
        column_index=pointer(index.column_index),
        batch=query.shape[0],
        num_heads=len(heads),
        group=query.shape[1] // key.shape[1],
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        num_blocks=num_query_blocks(query.shape[2], mask.query_offset),
        list_width=index.block_index.shape[-1],
        column_width=index.column_index.shape[-1],
        query_offset=mask.query_offset,
        window=mask.window,
        causal=mask.causal,
        threads=torch.get_num_threads(),
        scale=scale,
        **{name: pointer(values) for name, values in parameters.items()},
        **strides("query", query),
        **strides("key", key),
    )
    library = load_library(replace(spec or estimate_spec(query), kernel=kernel))
    if library[f"{kernel}_index"](ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory to estimate an index over keys {tuple(key.shape)}")
