"""Launch generated kernels: what all launchers share.

Nothing here waits for the device: sizes come from shapes, buffers have fixed sizes, and the small
host lists of a call (slots, budgets) are on the device already, or travel as kernel arguments: a
CUDA graph may record all of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.triton.building import wait_for
from mpass.lowering.triton.direct import run_kernel
from mpass.lowering.triton.dry_run import active_run, find_constant
from mpass.lowering.triton.interpret import interpreted, interpreted_language
from mpass.lowering.triton.source import load
from mpass.lowering.triton.spec import Target, TritonKernelSpec, target_of

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}
"""Dtypes of query, key and value that kernels are made for, by their names in a spec."""

INTS_PER_LAUNCH = 64
"""Host integers that one launch of ints.py.jinja writes."""


def launch(spec: TritonKernelSpec, kernel: str, grid: tuple[int, ...], /, **arguments: Any) -> None:
    """Run `kernel` of the module of `spec`; interpreted where the tensors are on the CPU.

    arguments: by the names that the kernel has for them. An empty grid launches nothing. In a dry
    run nothing is launched either.
    """
    if 0 in grid:
        return
    device = next(a for a in arguments.values() if isinstance(a, Tensor)).device
    run = active_run()
    if run is not None:
        run.add(spec, kernel, grid, device, arguments)
    elif interpreted(device):
        with interpreted_language():
            getattr(load(spec, interpret=True), kernel)[grid](**arguments)
    else:
        wait_for(spec, kernel)
        function = getattr(load(spec), kernel)
        on_device(device, lambda: run_kernel(function, spec, kernel, grid, arguments))


def on_device(device: torch.device, act: Callable[[], object]) -> None:
    """Do something with a GPU as the current device; it mostly is, and asking costs less."""
    if device.index is None or torch.cuda.current_device() == device.index:
        act()
        return
    with torch.cuda.device(device):
        act()


def target_for(device: torch.device) -> Target:
    """The table's entry for a device; the interpreter takes sm_90's."""
    return "sm_90" if interpreted(device) else _target_of_device(device)


@functools.cache
def _target_of_device(device: torch.device) -> Target:
    if torch.version.hip:
        return target_of(torch.cuda.get_device_properties(device).gcnArchName.split(":")[0])
    major, minor = torch.cuda.get_device_capability(device)
    return target_of(f"sm_{major}{minor}")


def device_ints(numbers: Iterable[int], device: torch.device) -> Tensor:
    """int32 tensor of host integers, not to be written to.

    It is there already where it was foreseen (dry_run.py); else a kernel writes it, since copies
    from the host would stall the device or break a capture.
    """
    values = tuple(numbers)
    run = active_run()
    if run is not None:  # on fake tensors, among which none that is known could be
        run.numbers[values, device] = None
        return torch.empty(len(values), dtype=torch.int32, device=device)
    known = find_constant(values, device)
    if known is not None:
        return known
    out = torch.empty(len(values), dtype=torch.int32, device=device)
    spec = TritonKernelSpec("ints", num_warps=1, target=target_for(device))
    for start in range(0, len(values), INTS_PER_LAUNCH):
        chunk = list(values[start : start + INTS_PER_LAUNCH])
        padded = chunk + [0] * (INTS_PER_LAUNCH - len(chunk))
        named = {f"value_{i}": value for i, value in enumerate(padded)}
        launch(spec, "write_ints", (1,), out=out[start:], count=len(chunk), **named)
    return out


def strides(name: str, tensor: Tensor) -> dict[str, int]:
    """The stride arguments of a tensor [B, H, N, D] whose last dimension is contiguous."""
    batch, head, row, _ = tensor.stride()
    return {f"{name}_stride_b": batch, f"{name}_stride_h": head, f"{name}_stride_n": row}


def row_major(tensor: Tensor) -> Tensor:
    """The tensor itself if its last dimension is contiguous, as kernels need; else a copy."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()
