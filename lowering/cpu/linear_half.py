"""Linear layers whose products are of half-precision numbers, by generated C++.

AVX512-FP16 multiplies 32 of them at a time, where fp32 has 16. The meaning is `linear_in_half` of
mpass.lowering.reference.linear.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from mpass.lowering.cpu.arguments import LinearArguments, pointer, rows_contiguous
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.linear import linear_in_fp32
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, fp16_fault, machine_reason
from mpass.lowering.reference.linear import CHAIN

INSTRUCTIONS = "avx512_fp16"

DTYPES = (torch.bfloat16, torch.float16)

NO_MEMORY, NOT_FINITE = 1, 2
"""What the kernel returns where it has written no result."""


def half_linear_reason(dtype: torch.dtype) -> str:
    """Why linear layers of a dtype are not multiplied in half precision here; "" if they are."""
    if dtype not in DTYPES:
        name = dtype_name(dtype)
        return f"linear layers in half precision are for bfloat16 and float16, not {name}"
    return machine_reason() or fp16_fault()


def linear_in_half(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of rows [.., K] and a weight [M, K], multiplied in half precision -> [.., M].

    What has a number that is not finite is multiplied in fp32.
    """
    flat = rows_contiguous(rows.reshape(rows.shape[:-1].numel(), rows.shape[-1]))
    weight = rows_contiguous(weight)
    (count, inputs), outputs = flat.shape, weight.shape[0]
    if not count * inputs * outputs:
        return torch.nn.functional.linear(rows, weight, bias)
    out = torch.empty(count, outputs, dtype=rows.dtype, device="cpu")
    added = None if bias is None else bias.float().contiguous()
    arguments = LinearArguments(
        rows=pointer(flat),
        weight=pointer(weight),
        bias=pointer(added),
        out=pointer(out),
        num_rows=count,
        inputs=inputs,
        outputs=outputs,
        rows_stride=flat.stride(0),
        weight_stride=weight.stride(0),
        threads=torch.get_num_threads(),
    )
    status = load_library(half_spec(rows.dtype)).linear_half(ctypes.byref(arguments))
    if status == NO_MEMORY:
        raise MemoryError(f"no memory for a linear layer of {inputs} inputs")
    if status == NOT_FINITE:
        return linear_in_fp32(rows, weight, bias)
    return out.view(*rows.shape[:-1], outputs)


def half_spec(dtype: torch.dtype) -> KernelSpec:
    """The specialisation of the kernel for a dtype."""
    return KernelSpec(dtype_name(dtype), CHAIN, CHAIN, INSTRUCTIONS, kernel="linear_half")
