"""A second launch goes straight to the compiled kernel, and gives it what Triton gave it."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering.triton import direct
from mpass.lowering.triton.launch import launch
from mpass.lowering.triton.spec import TritonKernelSpec
from tests.helpers.fake_gpu import cpu_gpu

SPEC = TritonKernelSpec("ints", num_warps=1)


class Compiled:
    """Stands for a compiled kernel: notes what it was launched with."""

    function = 7
    packed_metadata = (1, 2)

    def __init__(self, log):
        self.log = log

    def launch_metadata(self, *arguments):
        return None

    def run(self, *arguments):
        self.log.append(arguments)


@pytest.fixture
def log(monkeypatch):
    """Launches as compiled kernels see them; `log.compiled` counts what Triton was asked for."""
    jit = pytest.importorskip("triton.runtime.jit")
    cpu_gpu(monkeypatch)
    seen: list[tuple] = []

    def compile_nothing(self, *arguments):
        return Compiled(seen)

    asked = []
    run = jit.JITFunction.run
    monkeypatch.setattr(jit.JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(
        jit.JITFunction, "run", lambda self, *a, **k: asked.append(1) or run(self, *a, **k)
    )
    return seen, asked


def write(out, first=5):
    numbers = {f"value_{i}": first + i for i in range(64)}
    launch(SPEC, "write_ints", (1,), out=out, count=3, **numbers)


def plain(arguments):
    """Arguments with tensors as their addresses, and without metadata and hooks."""
    kept = arguments[:6] + arguments[9:]
    return [a.data_ptr() if isinstance(a, torch.Tensor) else a for a in kept]


def test_a_second_launch_passes_what_the_first_did(log):
    seen, asked = log
    out = torch.empty(64, dtype=torch.int32)
    write(out)
    write(out)
    assert len(seen) == 2 and len(asked) == 1
    assert plain(seen[1]) == plain(seen[0])
    write(out, first=9)
    assert len(asked) == 1 and plain(seen[2])[8:12] == [9, 10, 11, 12]


def test_what_takes_another_kernel_goes_through_triton(log):
    seen, asked = log
    out = torch.empty(64, dtype=torch.int32)
    write(out)
    write(out[1:])  # no multiple of 16 bytes
    assert len(asked) == 2
    write(out.long())  # another type
    assert len(asked) == 3
    write(out)
    assert len(asked) == 3 and len(seen) == 4


def test_strides_beyond_32_bits_or_no_multiples_of_16_go_through_triton():
    handle = direct.Handle(None, (("stride", True), ("count", None)))
    assert handle.values({"stride": 128, "count": 3}) == [128, 3]
    assert handle.values({"stride": 100, "count": 3}) is None
    assert handle.values({"stride": 1 << 31, "count": 3}) is None
    assert handle.values({"stride": 1, "count": 3}) is None


def test_on_amd_triton_launches_every_time(log, monkeypatch):
    """There the size of a tensor decides on the kernel as well."""
    monkeypatch.setattr(torch.version, "hip", "7.0")
    _, asked = log
    out = torch.empty(64, dtype=torch.int32)
    write(out)
    write(out)
    assert len(asked) == 2 and direct._handles == {}


def test_a_profiler_hears_of_every_launch(log, monkeypatch):
    from triton import knobs

    _, asked = log
    out = torch.empty(64, dtype=torch.int32)
    heard = []
    write(out)
    knobs.runtime.launch_enter_hook.add(heard.append)
    try:
        write(out)
    finally:
        knobs.runtime.launch_enter_hook.remove(heard.append)
    assert len(asked) == 2
    write(out)
    assert len(asked) == 2


def test_every_kernel_of_a_layer_is_launched_straight_the_second_time(log):
    """Estimation and attention of a layer of whole blocks need Triton once."""
    from mpass.lowering.index import AttentionMask
    from mpass.lowering.inputs import AttentionInputs, EstimateInputs
    from mpass.lowering.triton import LOWERING
    from mpass.patterns.base import find_pattern

    seen, asked = log
    query, key, value = (
        torch.randn(1, 256, heads, 64).half().transpose(1, 2) for heads in (4, 2, 2)
    )
    pattern = find_pattern("union")()
    inputs = EstimateInputs(query, key, AttentionMask(), range(4), 0.1)

    def layer():
        index = LOWERING.estimate(pattern.estimator)(inputs, [pattern.rule()] * 4)
        LOWERING.sparse_attention(AttentionInputs(query, key, value, AttentionMask(), 0.1), index)

    layer()
    first, kinds = len(asked), len(seen)
    layer()
    assert len(asked) == first and len(seen) == 2 * kinds
