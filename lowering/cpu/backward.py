"""Gradients of sparse attention by generated C++; reference/backward.py says what they mean."""

from __future__ import annotations

import ctypes

import torch

from mpass.lowering.cpu.arguments import BackwardArguments, pointer, rows_contiguous, strides
from mpass.lowering.cpu.attention import bias_lines, call_arguments
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import backward_spec
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.backward import ForwardResult, Gradients, row_dots


def attention_backward(
    inputs: AttentionInputs, index: SparseIndex, result: ForwardResult
) -> Gradients:
    """Gradients of query, key and value in fp32, bf16 or fp16; contiguous.

    The bits are the same in every run with as many threads. Raises MemoryError if the packed keys
    and the sums of their gradients do not fit: both are O(Nk).
    """
    return run_backward(backward_spec(inputs), inputs, index, result)


def run_backward(
    spec: KernelSpec, inputs: AttentionInputs, index: SparseIndex, result: ForwardResult
) -> Gradients:
    """`attention_backward` with a chosen specialisation."""
    query, key, value = inputs.query, inputs.key, inputs.value
    gradients = tuple(torch.empty(t.shape, dtype=t.dtype) for t in (query, key, value))
    grad_query, grad_key, grad_value = gradients
    if query.numel() == 0 or key.shape[2] == 0:
        return grad_query.zero_(), grad_key.zero_(), grad_value.zero_()
    lse, dots = result.lse.contiguous(), row_dots(result)
    grad_out = rows_contiguous(result.grad_out.to(query.dtype))
    arguments, _kept = call_arguments(inputs, index, result.out, lse)
    parts = num_parts(arguments.threads, key.shape[0] * key.shape[1], arguments.num_blocks)
    turned = grad_lines = None
    length = query.shape[2] + key.shape[2] - 1
    if inputs.distance_bias is not None:
        turned = bias_lines(inputs.distance_bias[:, :length].flip(1))
        arguments.bias_head = 0 if turned.shape[0] == 1 else turned.shape[1]
        group = query.shape[1] // key.shape[1]
        grad_lines = torch.zeros(*key.shape[:2], parts, group, turned.shape[1])
    more = BackwardArguments(
        grad_out=pointer(grad_out),
        dots=pointer(dots),
        grad_query=pointer(grad_query),
        grad_key=pointer(grad_key),
        grad_value=pointer(grad_value),
        turned_bias=pointer(turned),
        grad_bias=pointer(grad_lines),
        line=0 if turned is None else turned.shape[1],
        parts=parts,
        **strides("grad_out", grad_out),
    )
    run = load_library(spec).attention_backward
    if run(ctypes.byref(arguments), ctypes.byref(more)) != 0:
        raise MemoryError(f"no memory for the gradients of keys {tuple(key.shape)}")
    if result.grad_bias is not None and grad_lines is not None:
        of_heads = grad_lines.sum((0, 2)).flatten(0, 1)[:, :length].flip(1)
        if result.grad_bias.shape[0] == 1:
            of_heads = of_heads.sum(0, keepdim=True)
        result.grad_bias[:, :length] += of_heads
    return grad_query, grad_key, grad_value


def num_parts(threads: int, heads: int, num_blocks: int) -> int:
    """Units per kv head: as few as keep all threads busy, since each has sums of its own.

    threads: of the call; heads: kv heads of the batch; num_blocks: query blocks of a head.
    """
    if threads <= 1 or heads % threads == 0:
        return 1
    return max(1, min(num_blocks, -(-2 * threads // heads)))
