"""Make ready what a layer will launch: its kernels compiled, its host integers on the device.

A kernel is compiled by Triton's own `warmup`, with what stands for the tensors of the call, so that
the launch finds it under the very key that it looks for.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable

import torch
from torch._subclasses.fake_tensor import unset_fake_temporarily

from mpass.lowering.device import Build
from mpass.lowering.triton.building import compiling
from mpass.lowering.triton.direct import launch_options
from mpass.lowering.triton.dry_run import Launch, dry_run, keep_constants
from mpass.lowering.triton.launch import on_device
from mpass.lowering.triton.source import load

_at_once = threading.BoundedSemaphore(os.cpu_count() or 1)
"""Compilations that run at the same time, of all threads."""


def prepare(work: Callable[[], object]) -> list[Build]:
    """The kernels that `work` would launch, to be compiled in threads; its integers are made here.

    work: runs estimators and attention of this lowering on fake tensors. While a stream is captured
    no integers are made: calls then write their own.
    """
    with dry_run() as run:
        work()
    if run.numbers and not capturing():
        with unset_fake_temporarily():
            keep_constants(list(run.numbers))
    launches: dict[object, Launch] = {}
    for launch in run.launches:
        key = (launch.spec, launch.kernel, launch.device, *launch.arguments.values())
        launches.setdefault(key, launch)
    return [compilation(launch) for launch in launches.values()]


def capturing() -> bool:
    """Whether the current stream records a CUDA graph."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def compilation(launch: Launch) -> Build:
    """What compiles the kernel of a launch; while it does, launches of the kernel wait."""

    def build() -> None:
        # A launch that comes before its turn does the work, and leaves none.
        with _at_once, compiling(launch.spec, launch.kernel):
            compile_launch(launch)

    return Build(f"{launch.spec.template}.{launch.kernel}", build)


def compile_launch(launch: Launch) -> None:
    """Compile the kernel that a launch takes, for the device of the launch."""
    function = getattr(load(launch.spec), launch.kernel)
    arguments = launch.arguments | launch_options(launch.spec)
    on_device(launch.device, lambda: function.warmup(grid=launch.grid, **arguments))
