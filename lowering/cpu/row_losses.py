"""What an index loses of some rows, by generated C++; the meaning is that of exact_rows.py."""

from __future__ import annotations

import ctypes
from dataclasses import replace

import torch

from mpass.lowering.cpu.arguments import RowLossArguments, pointer
from mpass.lowering.cpu.attention import call_arguments
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import kernel_spec
from mpass.lowering.exact_rows import real_rows, sampled_rows
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs, RowLosses


def row_losses(inputs: AttentionInputs, index: SparseIndex, count: int, outputs: bool) -> RowLosses:
    """Of `count` rows, in fp32, bf16 or fp16. Raises MemoryError if buffers do not fit."""
    return run_row_losses(
        replace(kernel_spec(replace(inputs, int8=False)), kernel="row_losses"),
        *(inputs, index, count, outputs),
    )


def run_row_losses(
    spec: KernelSpec, inputs: AttentionInputs, index: SparseIndex, count: int, outputs: bool
) -> RowLosses:
    """`row_losses` with a chosen specialisation."""
    query, value = inputs.query, inputs.value
    batch, heads, num_queries, _ = query.shape
    count = min(count, num_queries)
    rows = sampled_rows(num_queries, 0, count, count, query.device)
    lost = torch.full((batch, heads, count), -1.0)
    exact = torch.zeros(batch, heads, count, value.shape[-1]) if outputs else None
    if query.numel() and inputs.key.shape[2]:
        arguments, _kept = call_arguments(inputs, index, query, None)  # it writes no output
        more = RowLossArguments(
            positions=pointer(rows), lost=pointer(lost), exact=pointer(exact), count=count
        )
        run = load_library(spec).row_losses
        if run(ctypes.byref(arguments), ctypes.byref(more)) != 0:
            raise MemoryError(f"no memory to weigh {count} rows of {tuple(query.shape)}")
    counted = (lost >= 0).all(1)
    real = real_rows(inputs, rows)
    return RowLosses(rows, counted if real is None else counted & real, lost.clamp_(min=0.0), exact)
