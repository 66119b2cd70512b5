"""Gradients of sparse attention by generated Triton kernels: of queries, of columns, of keys.

reference/backward.py says what they mean. The gradients of queries walk the index as the forward
pass does. Those of keys walk it turned round (turned.py), so that each sum has one writer: no
atomics add numbers, and two runs give the same bits. Letters: B batch, H query heads, Hk kv heads,
Nq queries, Nk keys, D head_dim, Dv value dim, I query blocks, J key blocks, C columns per head
padded to whole tiles.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.index import BLOCK, SparseIndex, num_key_blocks, num_query_blocks
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.backward import ForwardResult, Gradients
from mpass.lowering.triton.attention import (
    LOG2_E,
    attention_spec,
    gather_columns,
    index_sizes,
    mask_bytes,
    plan_rows,
)
from mpass.lowering.triton.interpret import interpreted, upcast
from mpass.lowering.triton.launch import launch, row_major, strides
from mpass.lowering.triton.spec import TritonKernelSpec, gradient_tile
from mpass.lowering.triton.turned import turn_lists


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """What the gradients of keys read of each query: both fp32 [B, H, Nq].

    exponents: log-sum-exps in log2 units, infinity of rows that saw nothing; dots: the sum of
    out * grad_out.
    """

    exponents: Tensor
    dots: Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Columns:
    """The columns of all heads: keys [B, H, C, D], values [B, H, C, Dv], positions, and bits.

    positions: int32 [B, H, C]; bits: int32 [B, H, I, C // 32], which query block sees which.
    """

    key: Tensor
    value: Tensor
    positions: Tensor
    bits: Tensor


def attention_backward(
    inputs: AttentionInputs, index: SparseIndex, result: ForwardResult
) -> Gradients:
    """Gradients of query, key and value, contiguous; the same bits in every run.

    On CPU tensors the kernels are interpreted, for tests.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    gradients = tuple(
        torch.empty(t.shape, dtype=t.dtype, device=t.device) for t in operands(inputs)
    )
    grad_query, grad_key, grad_value = gradients
    if query.numel() == 0 or key.numel() == 0:
        no_query, no_key, no_value = (t.new_zeros(t.shape) for t in (query, key, value))
        return no_query, no_key, no_value
    inputs, result = kernel_operands(inputs, result)
    spec = gradient_spec("query_gradients", inputs, index)
    spans, bits = plan_rows(spec, inputs, index)
    columns = Columns(*gather_columns(spec, inputs, index), bits)
    rows = write_query_gradients(spec, inputs, index, result, grad_query, spans, columns)
    write_key_gradients(inputs, index, result, rows, columns, (grad_key, grad_value))
    return grad_query.to(query.dtype), grad_key.to(key.dtype), grad_value.to(value.dtype)


def operands(inputs: AttentionInputs) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value as kernels read them: in the interpreter bf16 becomes fp32."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if interpreted(query.device):
        return upcast(query), upcast(key), upcast(value)
    return query, key, value


def kernel_operands(
    inputs: AttentionInputs, result: ForwardResult
) -> tuple[AttentionInputs, ForwardResult]:
    """What the kernels read, rows contiguous."""
    query, key, value = map(row_major, operands(inputs))
    grad_out, out = (row_major(t.to(query.dtype)) for t in (result.grad_out, result.out))
    return (
        replace(inputs, query=query, key=key, value=value),
        ForwardResult(grad_out, out, result.lse.contiguous()),
    )


def gradient_spec(template: str, inputs: AttentionInputs, index: SparseIndex) -> TritonKernelSpec:
    """The kernel of a template that serves a call; reads shapes, dtypes and static arguments only.

    template: "query_gradients", "column_gradients" or "key_gradients".
    """
    spec = attention_spec(inputs, index)
    tile = gradient_tile(spec.target, template, spec.head_dim, spec.value_dim)
    return replace(
        spec,
        template=template,
        tile=tile.keys,
        pack=1,
        sinks=False,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )


def score_numbers(inputs: AttentionInputs) -> dict[str, float]:
    """The scale and the softcap as arguments of the kernels."""
    scale, softcap = inputs.scale, inputs.softcap
    score_scale = 2.0 * LOG2_E * scale / softcap if softcap > 0 else scale * LOG2_E
    return {"score_scale": score_scale, "softcap": softcap * LOG2_E}


def write_query_gradients(
    spec: TritonKernelSpec,
    inputs: AttentionInputs,
    index: SparseIndex,
    result: ForwardResult,
    grad_query: Tensor,
    spans: Tensor,
    columns: Columns,
) -> Rows:
    """Gradients of queries into `grad_query`, and what the gradients of keys read of each row.

    spans: of `plan_rows`.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    batch, heads, num_queries, _ = query.shape
    rows = Rows(torch.empty_like(result.lse), torch.empty_like(result.lse))
    launch(
        spec,
        "query_gradients",
        (num_query_blocks(num_queries, mask.query_offset), heads, batch),
        query=query,
        key=key,
        value=value,
        out=result.out,
        grad_out=result.grad_out,
        lse=result.lse,
        grad_query=grad_query,
        exponents=rows.exponents,
        dots=rows.dots,
        spans=spans,
        block_index=index.block_index.contiguous(),
        diagonal_index=index.diagonal_index.contiguous(),
        column_key=columns.key,
        column_value=columns.value,
        column_index=columns.positions,
        column_bits=columns.bits,
        key_mask=mask_bytes(mask, spans),
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        **strides("out", result.out),
        **strides("grad_out", result.grad_out),
        num_queries=num_queries,
        num_keys=key.shape[2],
        num_columns=columns.key.shape[2],
        query_offset=mask.query_offset,
        num_heads=heads,
        group=heads // key.shape[1],
        window=mask.window,
        **index_sizes(index),
        **score_numbers(inputs),
        scale=inputs.scale,
    )
    return rows


def write_key_gradients(
    inputs: AttentionInputs,
    index: SparseIndex,
    result: ForwardResult,
    rows: Rows,
    columns: Columns,
    gradients: tuple[Tensor, Tensor],
) -> None:
    """Gradients of keys and values into `gradients`, those of columns first."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    batch, heads, num_queries, _ = query.shape
    num_columns, max_columns = columns.key.shape[2], index.column_index.shape[-1]
    spec = gradient_spec("key_gradients", inputs, index)
    turned = turn_lists(inputs, index)
    column_grad_key = column_grad_value = rows.dots
    shared: dict[str, Any] = {
        "query": query,
        "grad_out": result.grad_out,
        "exponents": rows.exponents,
        "dots": rows.dots,
        **strides("query", query),
        **strides("grad_out", result.grad_out),
        "num_queries": num_queries,
        "num_columns": num_columns,
        "query_offset": mask.query_offset,
        "num_heads": heads,
        "window": mask.window,
        **score_numbers(inputs),
    }
    if spec.columns:
        column_grad_key = torch.empty_like(columns.key, dtype=torch.float32)
        column_grad_value = torch.empty_like(columns.value, dtype=torch.float32)
        launch(
            gradient_spec("column_gradients", inputs, index),
            "column_gradients",
            (-(-num_columns // BLOCK), heads, batch),
            column_key=columns.key,
            column_value=columns.value,
            column_index=columns.positions,
            column_bits=columns.bits,
            column_grad_key=column_grad_key,
            column_grad_value=column_grad_value,
            num_rows=num_query_blocks(num_queries, mask.query_offset),
            **shared,
        )
    sizes = index_sizes(index)
    del sizes["max_blocks"]
    launch(
        spec,
        "key_gradients",
        (num_key_blocks(key.shape[2]), key.shape[1], batch),
        key=key,
        value=value,
        grad_key=gradients[0],
        grad_value=gradients[1],
        spans=turned.spans,
        readers=turned.readers,
        diagonal_index=index.diagonal_index.contiguous(),
        column_count=index.column_count.contiguous(),
        column_index=index.column_index.contiguous(),
        column_grad_key=column_grad_key,
        column_grad_value=column_grad_value,
        key_mask=mask_bytes(mask, turned.spans),
        **strides("key", key),
        **strides("value", value),
        num_keys=key.shape[2],
        group=heads // key.shape[1],
        **sizes,
        turned_size=turned.readers.shape[-1],
        max_columns=max_columns,
        search_steps=max_columns.bit_length(),
        scale=inputs.scale,
        **shared,
    )
