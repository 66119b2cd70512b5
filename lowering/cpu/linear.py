"""Linear layers on CPUs, in 8 bits (rows by generated C++, products by oneDNN) and in fp32.

The meaning is mpass.lowering.reference.linear.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from mpass.lowering.cpu.arguments import QuantizeArguments, pointer, rows_contiguous
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.spec import INPUT_TYPES, KernelSpec
from mpass.lowering.cpu.support import best_instruction_set, dtype_name, has, machine_reason
from mpass.lowering.reference import linear
from mpass.lowering.reference.linear import GROUP, ZERO

ROWS = 1024
"""Rows of an input that weights are laid out for; any number is multiplied with them."""


def linear_reason(dtype: torch.dtype) -> str:
    """Why linear layers of a dtype do not run in 8 bits here; "" if they do.

    Without VNNI the instructions for such products saturate at 16 bits, which would be wrong.
    """
    if dtype_name(dtype) not in INPUT_TYPES:
        return f"linear layers in 8 bits are for {', '.join(INPUT_TYPES)}, not {dtype_name(dtype)}"
    if not (has("vnni") or has("avx512_vnni") or has("amx_tile")):
        return "the processor has no VNNI, with which products of 8-bit numbers are exact"
    if not hasattr(torch.ops.onednn, "qlinear_pointwise"):
        return "this torch has no products of 8-bit numbers by oneDNN"
    return machine_reason() or ""


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Levels, uint8 [.., K], and steps, fp32 [.., 1], of rows [.., K]; K a multiple of GROUP."""
    width = rows.shape[-1]
    flat = rows_contiguous(rows.reshape(-1, width))
    levels = torch.empty(rows.shape, dtype=torch.uint8, device="cpu")
    steps = torch.empty((*rows.shape[:-1], 1), dtype=torch.float32, device="cpu")
    arguments = QuantizeArguments(
        rows=pointer(flat),
        levels=pointer(levels),
        steps=pointer(steps),
        num_rows=flat.shape[0],
        groups=width // GROUP,
        stride=flat.stride(0),
        threads=torch.get_num_threads(),
    )
    if load_library(quantize_spec(rows.dtype)).quantize_rows(ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory for a row of {width} numbers")
    return levels, steps


def quantize_spec(dtype: torch.dtype) -> KernelSpec:
    """The specialisation of the kernel that rotates rows and rounds them."""
    chosen = best_instruction_set(torch.float32)
    return KernelSpec(dtype_name(dtype), GROUP, GROUP, chosen, kernel="quantize_rows")


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A weight in 8 bits as oneDNN wants it, and what it was made from."""

    version: int
    address: int
    packed: Tensor
    steps: Tensor
    zeros: Tensor


_packed: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def packed_weight(weight: Tensor) -> PackedWeight:
    """The weight [M, K] in 8 bits, made anew where it has been written to since.

    It is kept as long as the weight is. A tensor made under inference mode counts no writes, so
    that nothing is kept of it.
    """
    version = -1 if weight.is_inference() else weight._version
    known: PackedWeight | None = _packed.get(weight)
    if known and version >= 0 and (known.version, known.address) == (version, weight.data_ptr()):
        return known
    levels, steps = linear.quantize_weight(weight.detach())
    packed = torch.ops.onednn.qlinear_prepack(levels, [ROWS, weight.shape[1]])
    zeros = torch.zeros(weight.shape[0], dtype=torch.int32, device="cpu")
    made = PackedWeight(version, weight.data_ptr(), packed, steps, zeros)
    if version >= 0:
        _packed[weight] = made
    return made


def multiply_rows(levels: Tensor, weight: Tensor) -> Tensor:
    """Levels [.., K] times the weight [M, K] in 8 bits -> [.., M] in the weight's dtype."""
    ready = packed_weight(weight)
    dtype = torch.float32 if weight.dtype == torch.float16 else weight.dtype
    flat = levels.reshape(-1, levels.shape[-1])
    out: Tensor = torch.ops.onednn.qlinear_pointwise(
        flat, 1.0, ZERO, ready.packed, ready.steps, ready.zeros, None, 1.0, 0, dtype, "none", [], ""
    )
    return out.to(weight.dtype).view(*levels.shape[:-1], weight.shape[0])


FP32_NUMBERS = 1 << 21
"""Numbers of an operand that are made fp32 at a time: they stay in a cache."""

FP32_ROWS, FP32_OUTPUTS = 1024, 128
"""Most rows at a time, and least outputs: products of fewer are slow."""


def linear_in_fp32(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of bf16 rows [.., K] and weight [M, K], multiplied in fp32 -> bf16 [.., M].

    The weight is made fp32 anew in each call, which costs as much as some 20 rows.
    """
    flat = rows.reshape(rows.shape[:-1].numel(), rows.shape[-1])
    (count, inputs), outputs = flat.shape, weight.shape[0]
    out = torch.empty(count, outputs, dtype=rows.dtype, device="cpu")
    height = min(count, FP32_ROWS, max(FP32_OUTPUTS, FP32_NUMBERS // max(inputs, 1)))
    width = min(outputs, max(FP32_OUTPUTS, FP32_NUMBERS // max(inputs, 1)))
    shapes = ((height, inputs), (width, inputs), (height, width))
    part, slab, sums = parts_of_scratch([*shapes])
    for column in range(0, outputs, max(width, 1)):
        columns = slice(column, min(column + width, outputs))
        wide = slab[: columns.stop - column].copy_(weight[columns]).t()
        wide_bias = None if bias is None else bias[columns].float()
        for row in range(0, count, max(height, 1)):
            chosen = slice(row, min(row + height, count))
            narrow = part[: chosen.stop - row].copy_(flat[chosen])
            found = sums[: chosen.stop - row, : wide.shape[1]]
            # Into memory that is there: autocast leaves such products alone, too.
            if wide_bias is None:
                torch.mm(narrow, wide, out=found)
            else:
                torch.addmm(wide_bias, narrow, wide, out=found)
            out[chosen, columns].copy_(found)
    return out.view(*rows.shape[:-1], outputs)


def parts_of_scratch(shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Tensors of these shapes, fp32, whose content is any, in memory that this thread keeps.

    Memory that is given back comes from the system anew, page by page, which would take 8% of a
    prefill. What is too large for that is made for this call.
    """
    sizes = [height * width for height, width in shapes]
    kept = scratch(threading.get_ident()) if sum(sizes) <= 3 * FP32_NUMBERS else None
    if kept is None:
        kept = torch.empty(sum(sizes), dtype=torch.float32, device="cpu")
    flat = kept[: sum(sizes)].split(sizes)
    return [part.view(shape) for part, shape in zip(flat, shapes, strict=True)]


@functools.lru_cache(maxsize=4)
def scratch(thread: int) -> Tensor:
    """Memory of a thread: 24 MiB, of which only what is used is ever taken from the system."""
    with torch.inference_mode(False):
        return torch.empty(3 * FP32_NUMBERS, dtype=torch.float32, device="cpu")
