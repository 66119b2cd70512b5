"""A GPU that is not there: other devices whose tensors go its way.

Tensors of device "meta" have no numbers that anything could read: what asks for one raises. Those
of a CPU have, and their launches get as far as Triton. Its driver is a stub that says sm_90, so
that kernels may be compiled and their keys compared, and never launched.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpass.lowering import dispatch
from mpass.lowering.triton import LOWERING, direct, launch

READS_THE_DEVICE = {
    "_local_scalar_dense",
    "item",
    "nonzero",
    "masked_select",
    "equal",
    "is_nonzero",
    "unique",
    "_unique2",
    "unique_consecutive",
}
"""Ops whose result the host, or the size of a tensor, waits for."""

COPIES_FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy"}
"""What torch.tensor leaves: a CUDA graph must not record it for a tensor on a GPU."""

ADDS_BY_ATOMICS = {
    *("scatter_add", "scatter_add_", "scatter_reduce", "scatter_reduce_"),
    *("index_add", "index_add_", "bincount", "histc", "embedding_bag"),
}
"""Ops that add in the order in which threads come."""

NO_KERNEL = {
    "empty",
    "empty_strided",
    "new_empty",
    "new_empty_strided",
    "empty_like",
    "view",
    "_unsafe_view",
    "as_strided",
    "expand",
    "slice",
    "select",
    "transpose",
    "permute",
    "unbind",
    "split",
    "split_with_sizes",
    "detach",
    "alias",
    "unsqueeze",
    "squeeze",
    "t",
    "device",
}
"""Ops that launch nothing."""


def meta_gpu(patch: pytest.MonkeyPatch) -> torch.device:
    """The device "meta" as a GPU: Triton's lowering serves it, and its tensors hold no numbers."""
    stub_device(patch)
    own = dataclasses.replace(LOWERING, device="meta", serves=lambda inputs: None)
    patch.setattr(dispatch, "_added", dispatch._added | {"meta": own})
    return torch.device("meta")


def cpu_gpu(patch: pytest.MonkeyPatch) -> None:
    """The CPU as a GPU: Triton's lowering serves it, and its launches are not interpreted."""
    stub_device(patch)
    own = dataclasses.replace(LOWERING, device="cpu", serves=lambda inputs: None)
    patch.setattr(dispatch, "_added", dispatch._added | {"cpu": own})
    for function in (*LOWERING.estimators.values(), LOWERING.sparse_attention):
        function.load()
    for name, module in list(sys.modules.items()):
        if name.startswith("mpass.lowering.triton") and hasattr(module, "interpreted"):
            patch.setattr(module, "interpreted", lambda device: False)


def stub_device(patch: pytest.MonkeyPatch) -> None:
    """torch and Triton believe in one GPU, an sm_90, until the test ends."""
    pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    patch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    launch._target_of_device.cache_clear()
    stub = SimpleNamespace(
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
        get_current_target=lambda: GPUTarget("cuda", 90, 32),
        get_active_torch_device=lambda: torch.device("cuda", 0),
    )
    patch.setattr(driver, "_active", stub)
    patch.setattr(direct, "_handles", {})


class Watched(TorchDispatchMode):
    """Counts the torch ops inside, and fails at one that the host waits for.

    forbidden: names of ops, without their overloads. Copies between devices fail, too. host_reads:
    whether numbers of a tensor on the CPU, one that has dimensions, may be read.
    ops: how often each ran; launches: those that launch something on a GPU, at least one kernel.
    """

    def __init__(
        self,
        forbidden: set[str] = READS_THE_DEVICE | COPIES_FROM_THE_HOST,
        *,
        host_reads: bool = False,
    ) -> None:
        super().__init__()
        self.forbidden = forbidden
        self.host_reads = host_reads
        self.ops: Counter[str] = Counter()
        self.launches = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        self.ops[name] += 1
        on_host = self.host_reads and devices(args[:1]) == {"cpu"}
        if name in self.forbidden - COPIES_FROM_THE_HOST and not on_host:
            raise AssertionError(f"the host waits for {func}")
        if name.startswith("index_put") and True in args[3:]:
            raise AssertionError(f"{func} adds in the order of chance")
        result = func(*args, **(kwargs or {}))
        if name in self.forbidden & COPIES_FROM_THE_HOST and devices([result]) - {"cpu"}:
            raise AssertionError(f"{func}: a tensor of host data on {devices([result])}")
        self.launches += name not in NO_KERNEL and writes_something(result)
        if len(devices(args) | devices([result])) > 1:
            raise AssertionError(f"{func} copies between {devices(args)} and {devices([result])}")
        return result


def writes_something(result: object) -> bool:
    """Whether a result has elements, so that making it launches at least one kernel on a GPU."""
    if isinstance(result, list | tuple):
        return any(map(writes_something, result))
    return isinstance(result, torch.Tensor) and result.numel() > 0


def devices(values: object) -> set[str]:
    """Types of the devices of the tensors among some values; scalars count for nothing."""
    if isinstance(values, torch.Tensor):
        return {values.device.type} if values.dim() or values.device.type != "cpu" else set()
    if isinstance(values, list | tuple):
        return set().union(*map(devices, values))
    return set()
