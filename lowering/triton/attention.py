"""Sparse attention by generated Triton kernels: plan the rows, gather the columns, attend.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim, I query
blocks, C columns per head padded to whole tiles.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    SparseIndex,
    diagonal_slots,
    list_slots,
    num_query_blocks,
)
from mpass.lowering.reference.attention import empty_output
from mpass.lowering.triton.interpret import upcast
from mpass.lowering.triton.launch import DTYPES, device_ints, launch, row_major, target_for
from mpass.lowering.triton.spec import (
    Form,
    KernelSpec,
    attention_tile,
    pack_warps,
    query_heads_per_program,
)

LOG2_E = math.log2(math.e)

SMALLEST_SCALE = 1e-8
"""The kernel folds the scale into exp2, which needs it positive and not vanishing."""


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
    """As mpass.lowering.reference.attention, in three launches whatever the heads' patterns.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] -> [B, H, Nq, Dv], laid out as
    [B, Nq, H, Dv]. On CPU tensors the kernels are interpreted, for tests.
    """
    out = empty_output(query, value)
    if out.numel() == 0:
        return out
    if key.shape[2] == 0:
        return out.zero_()
    target_out = out
    if query.device.type == "cpu":
        query, key, value = upcast(query), upcast(key), upcast(value)
        out = empty_output(query, value)
    if scale < SMALLEST_SCALE:
        query, scale = (-query, -scale) if scale < -SMALLEST_SCALE else (query * scale, 1.0)
    query, key, value = row_major(query), row_major(key), row_major(value)
    spec = attention_spec(query, key, value, index, mask, softcap=softcap, sinks=sinks)
    spans, bits = plan_rows(spec, query, key, index, mask)
    columns = gather_columns(spec, key, value, index)
    attend(
        spec,
        query,
        key,
        value,
        out,
        index,
        mask,
        spans,
        bits,
        columns,
        scale=scale,
        softcap=softcap,
        sinks=sinks,
    )
    return out if target_out.dtype == out.dtype else target_out.copy_(out)


def attention_spec(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex,
    mask: AttentionMask,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> KernelSpec:
    """The kernel that serves a call; reads shapes, dtypes and static arguments only."""
    head_dim, value_dim = query.shape[-1], value.shape[-1]
    target = target_for(query.device)
    columns = index.column_index.shape[-1] > 0
    window, padding = mask.window > 0, mask.key_mask is not None
    features = sum((columns, window, padding, softcap > 0))
    tile = attention_tile(target, head_dim, value_dim, features)
    group = query.shape[1] // key.shape[1]
    pack = query_heads_per_program(index.head_slots, group, tile.max_pack)
    return KernelSpec(
        template="attention",
        dtype=DTYPES[query.dtype],
        head_dim=head_dim,
        value_dim=value_dim,
        tile=tile.keys,
        pack=pack,
        form=entry_form(index.head_slots),
        columns=columns,
        causal=mask.causal,
        window=window,
        padding=padding,
        softcap=softcap > 0,
        sinks=sinks is not None,
        num_warps=pack_warps(tile, pack),
        num_stages=tile.num_stages,
        target=target,
    )


def entry_form(head_slots: tuple[int, ...]) -> Form:
    """What the heads' rows hold: key blocks, block distances, or each head its own."""
    if all(slot >= 0 for slot in head_slots):
        return "lists"
    return "diagonals" if all(slot < 0 for slot in head_slots) else "mixed"


def row_form(head_slots: tuple[int, ...]) -> Form:
    """The form of all heads where each reads its own row, in order; else mixed: look slots up."""
    if head_slots == list_slots(len(head_slots)):
        return "lists"
    return "diagonals" if head_slots == diagonal_slots(len(head_slots)) else "mixed"


def plan_rows(
    spec: KernelSpec, query: Tensor, key: Tensor, index: SparseIndex, mask: AttentionMask
) -> tuple[Tensor, Tensor]:
    """Spans [B, H, I, 8] and column bits [B, H, I, C // 32] of all rows, see rows.py.jinja."""
    batch, heads, num_queries, _ = query.shape
    rows = num_query_blocks(num_queries, mask.query_offset)
    num_columns = padded_columns(index, spec.tile)
    spans = torch.empty(batch, heads, rows, 8, dtype=torch.int32, device=query.device)
    bits = spans.new_empty(batch, heads, rows, num_columns // 32)
    form = row_form(index.head_slots)
    slots = device_ints(index.head_slots, query.device) if form == "mixed" else spans
    limits = key_limits(mask.key_mask) if mask.key_mask is not None else spans
    launch(
        KernelSpec(
            template="rows",
            tile=spec.tile,
            form=form,
            columns=spec.columns,
            causal=spec.causal,
            window=spec.window,
            padding=spec.padding,
            num_warps=1,
            target=spec.target,
        ),
        "plan_rows",
        (rows, heads, batch),
        spans,
        bits,
        *(tensor.contiguous() for tensor in index.tensors()),
        slots,
        mask_bytes(mask, spans),
        limits,
        key.shape[2],
        num_columns,
        index.column_index.shape[-1],
        mask.query_offset,
        heads,
        mask.window,
        *index_sizes(index),
        max(index.block_index.shape[-1], index.diagonal_index.shape[-1]).bit_length(),
    )
    return spans, bits


def gather_columns(
    spec: KernelSpec, key: Tensor, value: Tensor, index: SparseIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, H, C, D], values [B, H, C, Dv] and positions [B, H, C] of every head's columns."""
    batch, heads, max_columns = index.column_index.shape
    num_columns = padded_columns(index, spec.tile)
    column_key = key.new_empty(batch, heads, num_columns, key.shape[-1])
    column_value = value.new_empty(batch, heads, num_columns, value.shape[-1])
    positions = index.column_index.new_empty(batch, heads, num_columns)
    launch(
        KernelSpec(
            template="columns",
            dtype=spec.dtype,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            tile=spec.tile,
            target=spec.target,
        ),
        "gather_columns",
        (num_columns // spec.tile, heads, batch),
        column_key,
        column_value,
        positions,
        key,
        value,
        index.column_count.contiguous(),
        index.column_index.contiguous(),
        *key.stride()[:3],
        *value.stride()[:3],
        num_columns,
        max_columns,
        heads,
        heads // key.shape[1],
    )
    return column_key, column_value, positions


def attend(
    spec: KernelSpec,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    index: SparseIndex,
    mask: AttentionMask,
    spans: Tensor,
    bits: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    *,
    scale: float,
    softcap: float,
    sinks: Tensor | None,
) -> None:
    """The attention itself, into `out` [B, H, Nq, Dv]: one launch."""
    batch, heads, num_queries, _ = query.shape
    score_scale = 2.0 * LOG2_E * scale / softcap if softcap > 0 else scale * LOG2_E
    launch(
        spec,
        "sparse_attention",
        (num_query_blocks(num_queries, mask.query_offset), heads // spec.pack, batch),
        query,
        key,
        value,
        out,
        spans,
        index.block_index.contiguous(),
        index.diagonal_index.contiguous(),
        *columns,
        bits,
        mask_bytes(mask, spans),
        spans if sinks is None else sinks.float() * LOG2_E,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        *out.stride()[:3],
        num_queries,
        key.shape[2],
        columns[0].shape[2],
        mask.query_offset,
        heads,
        heads // key.shape[1],
        mask.window,
        *index_sizes(index),
        score_scale,
        softcap * LOG2_E,
    )


def index_sizes(index: SparseIndex) -> tuple[int, int, int, int]:
    """max_blocks, number of list rows, max_diagonals, number of diagonal rows."""
    return (
        index.block_index.shape[-1],
        index.block_index.shape[1],
        index.diagonal_index.shape[-1],
        index.diagonal_index.shape[1],
    )


def padded_columns(index: SparseIndex, tile: int) -> int:
    """Columns per head, rounded up to whole tiles."""
    return -(-index.column_index.shape[-1] // tile) * tile


def mask_bytes(mask: AttentionMask, unused: Tensor) -> Tensor:
    """The key mask as bytes; without one, any tensor in its place (the kernel does not read it)."""
    if mask.key_mask is None:
        return unused
    return mask.key_mask.contiguous().view(torch.uint8)


def key_limits(key_mask: Tensor) -> Tensor:
    """Per batch row, the key blocks that the padding leaves: int32 [B, 4], by device ops only.

    First and last block with a real key, then first and last block of real keys only. Blocks in
    between must all be whole for the latter; a mask with holes has none (last < first), so that
    every block of it is masked key by key.
    """
    batch, num_keys = key_mask.shape
    num_blocks = -(-num_keys // BLOCK)
    padded = torch.nn.functional.pad(key_mask, (0, num_blocks * BLOCK - num_keys))
    tiles = padded.view(batch, num_blocks, BLOCK)
    some, whole = tiles.any(-1), tiles.all(-1)
    blocks = torch.arange(num_blocks, device=key_mask.device)

    def first(flags: Tensor) -> Tensor:
        return torch.where(flags, blocks, num_blocks).amin(-1)

    def last(flags: Tensor) -> Tensor:
        return torch.where(flags, blocks, -1).amax(-1)

    whole_first, whole_last = first(whole), last(whole)
    unbroken = whole.sum(-1) == whole_last - whole_first + 1
    limits: list[Any] = [
        first(some),
        last(some),
        whole_first,
        torch.where(unbroken, whole_last, -1),
    ]
    return torch.stack(limits, -1).to(torch.int32)
