"""One layer's sparse attention whole: estimation and attention, in time, by kernel, on the host."""

from __future__ import annotations

import functools
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.clock import milliseconds
from benchmarks.gpu.inputs import computed_flops
from benchmarks.gpu.setting import Row, Setting
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton import LOWERING as lowering

Estimator = Callable[[Tensor, Tensor], SparseIndex]

HOST_CALLS = 10
"""Layers that are launched in a row without waiting, to see what a launch costs the host."""

PROFILED_CALLS = 3
"""Layers under the profiler."""

LONG = 200.0
"""Milliseconds from which a layer is launched once for each of these."""


def time_layer(setting: Setting, length: int, estimate: Estimator) -> Row:
    """Estimation and attention of one layer: device time, time replayed, host time, by kernel.

    ms: between events around the launches; replayed_ms: as a CUDA graph, without the host;
    attention_ms: of the attention alone; host_us: until the launches of a layer have returned;
    work: share of dense attention's; kernels: milliseconds by name.
    """
    query, key, value = setting.tensors(length)
    shape = setting.shape(length)

    def attend(index: SparseIndex) -> Tensor:
        mask = AttentionMask()
        return lowering.sparse_attention(
            AttentionInputs(query, key, value, mask, query.shape[-1] ** -0.5), index
        )

    def layer() -> Tensor:
        return attend(estimate(query, key))

    index = estimate(query, key)
    work = computed_flops(index, length, query.shape[-1]) / shape.dense_flops
    row: Row = {"ms": milliseconds(layer, setting.device), "work": work}
    row["attention_ms"] = milliseconds(functools.partial(attend, index), setting.device)
    row["tflops"] = work * shape.dense_flops / row["attention_ms"] / 1e9
    if setting.smoke:
        return row
    long = row["ms"] > LONG
    row["host_us"] = host_microseconds(layer, 1 if long else HOST_CALLS)
    row["kernels"] = kernel_milliseconds(layer, 1 if long else PROFILED_CALLS)
    row["replayed_ms"] = replayed_milliseconds(layer, setting.device)
    return row


def host_microseconds(run: Callable[[], Any], calls: int) -> float:
    """Median time until a call returns, the device still at work."""
    run()
    torch.cuda.synchronize()
    spent = []
    for _ in range(calls):
        begun = time.perf_counter()
        run()
        spent.append(1e6 * (time.perf_counter() - begun))
    torch.cuda.synchronize()
    return statistics.median(spent)


def kernel_milliseconds(run: Callable[[], Any], calls: int) -> dict[str, float]:
    """Device time of one call by kernel name, the longest first, as torch's profiler sees it."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU]) as seen:
        for _ in range(calls):
            run()
        torch.cuda.synchronize()
    totals: dict[str, float] = defaultdict(float)
    for event in seen.events():
        if event.device_type == torch.autograd.DeviceType.CUDA:
            totals[event.name[:60]] += event.device_time / 1e3 / calls
    return {name: round(totals[name], 4) for name in sorted(totals, key=lambda n: -totals[n])[:16]}


def replayed_milliseconds(run: Callable[[], Any], device: torch.device) -> float:
    """Device time of a call that was captured in a CUDA graph."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return milliseconds(graph.replay, device)
