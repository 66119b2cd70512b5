"""What a layer will launch, found out without launching: a run of its launchers on fake tensors.

A launcher decides by shapes, dtypes and static numbers only, so that fake tensors make it ask for
the kernels and the host integers that real ones will. Both are then made ready outside of any call:
kernels are compiled ahead (warm_up.py), and integers become tensors on the device, once.

Why the tensors are made there and nowhere else: what a call allocates while CUDA graphs warm up or
capture lies in their private pool, which takes it back. So a call only looks its integers up, and
where nobody has foreseen them it writes them by a launch (launch.device_ints), which a graph may
record as well. They are kept for the life of the process: a captured graph holds their address, and
a layer has a few hundred bytes of them. Nothing ever writes to one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.triton.spec import TritonKernelSpec

ALIGNMENT = 16
"""Bytes: whether an address is a multiple of these decides which code Triton makes."""


@dataclass(frozen=True, slots=True)
class Address:
    """Stands for a tensor where Triton chooses the code of a kernel: its dtype and alignment."""

    dtype: torch.dtype
    offset: int

    def data_ptr(self) -> int:
        """An address that is as aligned as the tensor's will be."""
        return self.offset

    def ptr_range(self) -> int:
        """Bytes from there on, as Triton asks for on AMD GPUs: few enough for 32-bit offsets."""
        return 0


@dataclass(frozen=True, slots=True, eq=False)
class Launch:
    """One launch that a layer will make; tensors among its arguments are an `Address`."""

    spec: TritonKernelSpec
    kernel: str
    grid: tuple[int, ...]
    device: torch.device
    arguments: dict[str, Any]


@dataclass(slots=True)
class DryRun:
    """What launchers asked for: their launches, and host integers with the device they are for."""

    launches: list[Launch] = field(default_factory=list)
    numbers: dict[tuple[tuple[int, ...], torch.device], None] = field(default_factory=dict)

    def add(
        self,
        spec: TritonKernelSpec,
        kernel: str,
        grid: tuple[int, ...],
        device: torch.device,
        arguments: dict[str, Any],
    ) -> None:
        """Note a launch instead of making it."""
        held = {name: address_of(value) for name, value in arguments.items()}
        self.launches.append(Launch(spec, kernel, grid, device, held))


_active: ContextVar[DryRun | None] = ContextVar("mpass_triton_dry_run", default=None)

_constants: dict[tuple[tuple[int, ...], torch.device], Tensor] = {}


def address_of(value: Any) -> Any:
    """What Triton looks at of a tensor; other arguments are themselves."""
    if not isinstance(value, Tensor):
        return value
    offset = int(value.storage_offset()) * value.element_size()
    return Address(value.dtype, ALIGNMENT + offset % ALIGNMENT)


def active_run() -> DryRun | None:
    """The dry run that this thread is in, or None."""
    return _active.get()


@contextlib.contextmanager
def dry_run() -> Iterator[DryRun]:
    """Launchers called inside launch nothing; what they would is in the result."""
    run = DryRun()
    token = _active.set(run)
    try:
        yield run
    finally:
        _active.reset(token)


def find_constant(values: tuple[int, ...], device: torch.device) -> Tensor | None:
    """The int32 tensor made of these integers beforehand, if one was; not to be written to."""
    return _constants.get((values, device))


def keep_constants(numbers: Sequence[tuple[tuple[int, ...], torch.device]]) -> None:
    """Make the tensors of host integers that calls will look up, those that are not there yet.

    Copies from the host: not for a time in which a stream is captured.
    """
    for values, device in numbers:
        if (values, device) not in _constants:
            made = torch.tensor(values, dtype=torch.int32, device="cpu").to(device)
            _constants[values, device] = made
