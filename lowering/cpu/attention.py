"""Sparse attention by generated C++; the meaning is mpass.lowering.reference.attention."""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mpass.lowering.cpu.arguments import AttentionArguments, pointer, rows_contiguous, strides
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import kernel_spec
from mpass.lowering.index import BLOCK, SparseIndex, num_query_blocks
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import empty_lse, empty_output


def sparse_attention(inputs: AttentionInputs, index: SparseIndex) -> Tensor:
    """Exact softmax attention over the keys that `index` selects and the mask allows.

    The result is [B, H, Nq, Dv], laid out as [B, Nq, H, Dv], in fp32, bf16 or fp16. Raises
    MemoryError if the packed keys do not fit.
    """
    return run_attention(kernel_spec(inputs), inputs, index)


def sparse_attention_lse(inputs: AttentionInputs, index: SparseIndex) -> tuple[Tensor, Tensor]:
    """`sparse_attention` and its log-sum-exps, fp32 [B, H, Nq]; as the reference's, which see."""
    lse = empty_lse(inputs.query)
    return run_attention(kernel_spec(inputs), inputs, index, lse), lse


def run_attention(
    spec: KernelSpec, inputs: AttentionInputs, index: SparseIndex, lse: Tensor | None = None
) -> Tensor:
    """`sparse_attention` with a chosen specialisation.

    lse: fp32 [B, H, Nq], contiguous, into which log-sum-exps are written; None for none.
    """
    query, key, value, sink_logits = inputs.query, inputs.key, inputs.value, inputs.sink_logits
    out = empty_output(query, value)
    if out.numel() == 0 or key.shape[2] == 0:
        if lse is not None:
            sinks = None if sink_logits is None else sink_logits.float().view(1, -1, 1)
            lse.copy_(sinks) if sinks is not None else lse.fill_(-torch.inf)
        return out.zero_()
    arguments, _kept = call_arguments(inputs, index, out, lse)
    if load_library(spec).sparse_attention(ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory to pack keys {tuple(key.shape)} and values for attention")
    return out


def call_arguments(
    inputs: AttentionInputs, index: SparseIndex, out: Tensor, lse: Tensor | None
) -> tuple[AttentionArguments, tuple[Tensor | None, ...]]:
    """What kernels are called with, and the tensors whose memory it points to.

    out: [B, H, Nq, Dv]; lse: fp32 [B, H, Nq] or None, contiguous.
    """
    mask, sink_logits = inputs.mask, inputs.sink_logits
    query, key, value = (rows_contiguous(t) for t in (inputs.query, inputs.key, inputs.value))
    key_mask = None if mask.key_mask is None else mask.key_mask.contiguous().view(torch.uint8)
    logits = None if sink_logits is None else sink_logits.to(torch.float32).contiguous()
    bias = None if inputs.distance_bias is None else bias_lines(inputs.distance_bias)
    slots = torch.tensor(index.head_slots, dtype=torch.int32, device="cpu")
    tensors = tuple(tensor.contiguous() for tensor in index.tensors())
    block_count, block_index, diagonal_count, diagonal_index, column_count, column_index = tensors
    arguments = AttentionArguments(
        query=pointer(query),
        key=pointer(key),
        value=pointer(value),
        out=pointer(out),
        lse=pointer(lse),
        key_mask=pointer(key_mask),
        sinks=pointer(logits),
        block_count=pointer(block_count),
        block_index=pointer(block_index),
        diagonal_count=pointer(diagonal_count),
        diagonal_index=pointer(diagonal_index),
        column_count=pointer(column_count),
        column_index=pointer(column_index),
        head_slots=pointer(slots),
        distance_bias=pointer(bias),
        batch=query.shape[0],
        heads=query.shape[1],
        kv_heads=key.shape[1],
        num_queries=query.shape[2],
        num_keys=key.shape[2],
        num_blocks=num_query_blocks(query.shape[2], mask.query_offset),
        num_lists=block_count.shape[1],
        max_blocks=block_index.shape[3],
        num_diagonals=diagonal_count.shape[1],
        max_diagonals=diagonal_index.shape[2],
        max_columns=column_index.shape[2],
        longest_columns=int(column_count.max()) if column_index.shape[2] else 0,
        query_offset=mask.query_offset,
        window=mask.window,
        causal=mask.causal,
        threads=torch.get_num_threads(),
        bias_head=0 if bias is None or bias.shape[0] == 1 else bias.shape[1],
        scale=inputs.scale,
        softcap=inputs.softcap,
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        **strides("out", out),
    )
    return arguments, (query, key, value, key_mask, logits, bias, slots, *tensors)


def bias_lines(bias: Tensor) -> Tensor:
    """Lines of a bias by distance [H or 1, L] as kernels read them: fp32, a block of zeros after.

    A tile of keys is read whole, and the last one ends beyond the last key.
    """
    return torch.nn.functional.pad(bias.to(torch.float32), (0, BLOCK)).contiguous()
