"""Sparse attention by generated Triton kernels: plan the rows, gather the columns, attend.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim, I query
blocks, C columns per head padded to whole tiles.
"""

from __future__ import annotations

import math
from dataclasses import replace
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
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import empty_lse, empty_output
from mpass.lowering.triton.interpret import interpreted, upcast
from mpass.lowering.triton.launch import (
    DTYPES,
    device_ints,
    launch,
    row_major,
    strides,
    target_for,
)
from mpass.lowering.triton.spec import (
    Form,
    TritonKernelSpec,
    attention_tile,
    pack_warps,
    query_heads_per_program,
)

LOG2_E = math.log2(math.e)

SMALLEST_SCALE = 1e-8
"""The kernel folds the scale into exp2, which needs it positive and not vanishing."""


def sparse_attention(inputs: AttentionInputs, index: SparseIndex) -> Tensor:
    """As mpass.lowering.reference.attention, in three launches whatever the heads' patterns.

    The result is [B, H, Nq, Dv], laid out as [B, Nq, H, Dv]. On CPU tensors the kernels are
    interpreted, for tests.
    """
    return run_attention(inputs, index, None)


def sparse_attention_lse(inputs: AttentionInputs, index: SparseIndex) -> tuple[Tensor, Tensor]:
    """`sparse_attention` and its log-sum-exps, fp32 [B, H, Nq]; as the reference's, which see."""
    lse = empty_lse(inputs.query)
    return run_attention(inputs, index, lse), lse


def run_attention(inputs: AttentionInputs, index: SparseIndex, lse: Tensor | None) -> Tensor:
    """`sparse_attention`, which also fills `lse` [B, H, Nq] if there is one."""
    out = empty_output(inputs.query, inputs.value)
    if out.numel() == 0:
        return out
    if inputs.key.shape[2] == 0:
        if lse is not None:
            sinks = inputs.sink_logits
            lse.fill_(-torch.inf) if sinks is None else lse.copy_(sinks.view(1, -1, 1))
        return out.zero_()
    inputs = kernel_operands(inputs)
    computed = out if inputs.query.dtype == out.dtype else empty_output(inputs.query, inputs.value)
    spec = attention_spec(inputs, index, lse=lse is not None)
    spans, bits = plan_rows(spec, inputs, index)
    columns = gather_columns(spec, inputs, index)
    attend(spec, inputs, index, computed, spans, bits, columns, lse)
    return computed if computed is out else out.copy_(computed)


def kernel_operands(inputs: AttentionInputs) -> AttentionInputs:
    """The inputs as the kernel reads them: rows contiguous, and a scale that is positive."""
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    if interpreted(query.device):
        query, key, value = upcast(query), upcast(key), upcast(value)
    if scale < SMALLEST_SCALE:
        query, scale = (-query, -scale) if scale < -SMALLEST_SCALE else (query * scale, 1.0)
    query, key, value = row_major(query), row_major(key), row_major(value)
    return replace(inputs, query=query, key=key, value=value, scale=scale)


def attention_spec(
    inputs: AttentionInputs, index: SparseIndex, *, lse: bool = False
) -> TritonKernelSpec:
    """The kernel that serves a call; reads shapes, dtypes and static arguments only.

    lse: whether it writes the log-sum-exps, too.
    """
    query, mask = inputs.query, inputs.mask
    head_dim, value_dim = query.shape[-1], inputs.value.shape[-1]
    target = target_for(query.device)
    columns = index.column_index.shape[-1] > 0
    window, padding, softcap = mask.window > 0, mask.key_mask is not None, inputs.softcap > 0
    flags = {"columns": columns, "window": window, "padding": padding, "softcap": softcap}
    flags["biased"] = inputs.distance_bias is not None
    features = [name for name, has in flags.items() if has]
    tile = attention_tile(target, head_dim, value_dim, features)
    group = query.shape[1] // inputs.key.shape[1]
    pack = query_heads_per_program(index.head_slots, group, tile.max_pack)
    return TritonKernelSpec(
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
        softcap=softcap,
        sinks=inputs.sink_logits is not None,
        biased=inputs.distance_bias is not None,
        lse=lse,
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
    spec: TritonKernelSpec, inputs: AttentionInputs, index: SparseIndex
) -> tuple[Tensor, Tensor]:
    """Spans [B, H, I, 8] and column bits [B, H, I, C // 32] of all rows, see rows.py.jinja."""
    query, mask = inputs.query, inputs.mask
    batch, heads, num_queries, _ = query.shape
    rows = num_query_blocks(num_queries, mask.query_offset)
    num_columns = padded_columns(index, spec.tile)
    spans = torch.empty(batch, heads, rows, 8, dtype=torch.int32, device=query.device)
    bits = spans.new_empty(batch, heads, rows, num_columns // 32)
    form = row_form(index.head_slots)
    longest = max(index.block_index.shape[-1], index.diagonal_index.shape[-1])
    launch(
        TritonKernelSpec(
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
        spans=spans,
        column_bits=bits,
        block_count=index.block_count.contiguous(),
        block_index=index.block_index.contiguous(),
        diagonal_count=index.diagonal_count.contiguous(),
        diagonal_index=index.diagonal_index.contiguous(),
        column_count=index.column_count.contiguous(),
        column_index=index.column_index.contiguous(),
        slots=device_ints(index.head_slots, query.device) if form == "mixed" else spans,
        key_mask=mask_bytes(mask, spans),
        limits=key_limits(mask.key_mask) if mask.key_mask is not None else spans,
        num_keys=inputs.key.shape[2],
        num_columns=num_columns,
        max_columns=index.column_index.shape[-1],
        query_offset=mask.query_offset,
        num_heads=heads,
        window=mask.window,
        **index_sizes(index),
        search_steps=longest.bit_length(),
    )
    return spans, bits


def gather_columns(
    spec: TritonKernelSpec, inputs: AttentionInputs, index: SparseIndex
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys [B, H, C, D], values [B, H, C, Dv] and positions [B, H, C] of every head's columns."""
    key, value = inputs.key, inputs.value
    batch, heads, max_columns = index.column_index.shape
    num_columns = padded_columns(index, spec.tile)
    column_key = key.new_empty(batch, heads, num_columns, key.shape[-1])
    column_value = value.new_empty(batch, heads, num_columns, value.shape[-1])
    positions = index.column_index.new_empty(batch, heads, num_columns)
    launch(
        TritonKernelSpec(
            template="columns",
            dtype=spec.dtype,
            head_dim=spec.head_dim,
            value_dim=spec.value_dim,
            tile=spec.tile,
            target=spec.target,
        ),
        "gather_columns",
        (num_columns // spec.tile, heads, batch),
        column_key=column_key,
        column_value=column_value,
        padded_index=positions,
        key=key,
        value=value,
        column_count=index.column_count.contiguous(),
        column_index=index.column_index.contiguous(),
        **strides("key", key),
        **strides("value", value),
        num_columns=num_columns,
        max_columns=max_columns,
        num_heads=heads,
        group=heads // key.shape[1],
    )
    return column_key, column_value, positions


def attend(
    spec: TritonKernelSpec,
    inputs: AttentionInputs,
    index: SparseIndex,
    out: Tensor,
    spans: Tensor,
    bits: Tensor,
    columns: tuple[Tensor, Tensor, Tensor],
    lse: Tensor | None = None,
) -> None:
    """The attention itself, into `out` [B, H, Nq, Dv], and its log-sum-exps: one launch.

    spans, bits: of `plan_rows`; columns: of `gather_columns`; lse: fp32 [B, H, Nq] or None, as the
    spec says.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    scale, softcap, sink_logits = inputs.scale, inputs.softcap, inputs.sink_logits
    batch, heads, num_queries, _ = query.shape
    column_key, column_value, positions = columns
    score_scale = 2.0 * LOG2_E * scale / softcap if softcap > 0 else scale * LOG2_E
    launch(
        spec,
        "sparse_attention",
        (num_query_blocks(num_queries, mask.query_offset), heads // spec.pack, batch),
        query=query,
        key=key,
        value=value,
        out=out,
        spans=spans,
        block_index=index.block_index.contiguous(),
        diagonal_index=index.diagonal_index.contiguous(),
        column_key=column_key,
        column_value=column_value,
        column_index=positions,
        column_bits=bits,
        key_mask=mask_bytes(mask, spans),
        sinks=spans if sink_logits is None else sink_logits.float() * LOG2_E,
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        **strides("out", out),
        num_queries=num_queries,
        num_keys=key.shape[2],
        num_columns=column_key.shape[2],
        query_offset=mask.query_offset,
        num_heads=heads,
        group=heads // key.shape[1],
        window=mask.window,
        **index_sizes(index),
        score_scale=score_scale,
        score_power=math.ldexp(0.5, math.frexp(score_scale)[1]),
        softcap=softcap * LOG2_E,
        **({} if lse is None else {"lse": lse}),
        **bias_arguments(inputs.distance_bias, 1.0 / scale),
    )


def bias_arguments(bias: Tensor | None, unit: float) -> dict[str, Any]:
    """A bias by distance [H or 1, L] as kernels read it: lines with a block of zeros after each.

    unit: what 1 of it is in scores before they are scaled.
    """
    if bias is None:
        return {}
    lines = torch.nn.functional.pad(bias.to(torch.float32), (0, BLOCK)).contiguous()
    apart = lines.shape[1] if lines.shape[0] > 1 else 0
    return {"bias": lines, "bias_head": apart, "bias_unit": unit}


def index_sizes(index: SparseIndex) -> dict[str, int]:
    """The sizes of an index as kernel arguments."""
    return {
        "max_blocks": index.block_index.shape[-1],
        "num_lists": index.block_index.shape[1],
        "max_diagonals": index.diagonal_index.shape[-1],
        "num_diagonals": index.diagonal_index.shape[1],
    }


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
