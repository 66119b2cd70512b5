"""Launch a kernel by its compiled handle, without Triton's way there.

`JITFunction.run` binds, specialises and looks up some forty arguments and reads its settings from
the environment at every launch, which costs several times what the driver does. All that decides
which code a launch takes is whether pointers and strides are multiples of ALIGNMENT, so that a
second launch in the usual case, where all are, needs no more than the handle of the first. On AMD
GPUs the size of a tensor decides, too (offsets of 32 bits), and Triton launches every time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, dtype

from mpass.lowering.triton.dry_run import ALIGNMENT
from mpass.lowering.triton.spec import TritonKernelSpec

WIDEST = 1 << 31
"""From here on Triton takes an integer argument as int64, which is another kernel."""


@dataclass(frozen=True, slots=True, eq=False)
class Handle:
    """A compiled kernel and how its arguments are passed.

    parameters: name, and dtype of a tensor, True for an integer that Triton specialises on, or None
    for what it does not.
    """

    compiled: Any
    parameters: tuple[tuple[str, dtype | bool | None], ...]

    def values(self, arguments: dict[str, Any]) -> list[Any] | None:
        """The arguments in order, tensors as addresses; None if they ask for another kernel."""
        found = []
        bits = 0
        for name, kind in self.parameters:
            value = arguments[name]
            if kind is None:
                pass
            elif kind is True:
                if value >= WIDEST:
                    return None
                bits |= value
            else:
                if value.dtype is not kind:
                    return None
                value = value.data_ptr()
                bits |= value
            found.append(value)
        return None if bits % ALIGNMENT else found


def launch_options(spec: TritonKernelSpec) -> dict[str, int]:
    """Triton's own arguments of a launch."""
    return {"num_warps": spec.num_warps, "num_stages": spec.num_stages}


_handles: dict[tuple[TritonKernelSpec, str, int], Handle] = {}


def run_kernel(
    function: Any,
    spec: TritonKernelSpec,
    kernel: str,
    grid: tuple[int, ...],
    arguments: dict[str, Any],
) -> None:
    """Launch `function`, the kernel of this name of the spec's module, on the current GPU.

    arguments: by the kernel's names for them. Where someone listens to launches (a profiler), where
    the arguments are not the usual ones and at the first launch, Triton does it all.
    """
    from triton import knobs
    from triton.runtime import driver

    active = driver.active
    device = active.get_current_device()
    handle = _handles.get((spec, kernel, device))
    values = None if handle is None or listened_to(knobs.runtime) else handle.values(arguments)
    if handle is None or values is None:
        compiled = function.run(grid=grid, warmup=False, **arguments, **launch_options(spec))
        if handle is None and torch.version.hip is None and hasattr(compiled, "packed_metadata"):
            made = Handle(compiled, parameters_of(function, arguments))
            if made.values(arguments) is not None:
                _handles[spec, kernel, device] = made
        return
    compiled = handle.compiled
    size = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    hooks = (None, None, None)  # metadata for them, and those around a launch: nobody listens
    compiled.run(*size, stream, compiled.function, compiled.packed_metadata, *hooks, *values)


def parameters_of(
    function: Any, arguments: dict[str, Any]
) -> tuple[tuple[str, dtype | bool | None], ...]:
    """How each parameter of a kernel is passed, in order; see Handle."""
    return tuple((p.name, passing(arguments[p.name], p)) for p in function.params)


def passing(value: Any, parameter: Any) -> dtype | bool | None:
    """The dtype of a tensor, whether Triton specialises on an integer, None for the rest."""
    if isinstance(value, Tensor):
        return value.dtype
    return True if isinstance(value, int) and not parameter.do_not_specialize else None


def listened_to(runtime: Any) -> bool:
    """Whether hooks around launches are set: a chain of them that is empty is none."""
    chains = (runtime.launch_enter_hook, runtime.launch_exit_hook)
    return any(chain is not None and getattr(chain, "calls", True) for chain in chains)
