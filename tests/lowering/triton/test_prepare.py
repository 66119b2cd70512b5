"""Kernels and host integers of a layer are there before its first call.

The launches go as far as Triton (tests/helpers/fake_gpu.py): its compiler is a stub that notes the
key of each kernel, and what it makes is launched into nothing.
"""

from __future__ import annotations

import threading
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import mpass
from mpass import warm_up
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.triton import (
    LOWERING,
    attention,
    building,
    direct,
    dry_run,
    launch,
    prepare,
    source,
    union,
)
from mpass.lowering.triton.spec import TritonKernelSpec
from mpass.patterns.base import registered_patterns
from tests.helpers.fake_gpu import Watched, cpu_gpu, meta_gpu
from tests.helpers.triton_cases import padding

MASKS = {
    "plain": AttentionMask(),
    "all": AttentionMask(True, 40, 90, padding(2, 300)),
}
WITH_KERNELS = sorted(registered_patterns())


@pytest.fixture
def compiled(monkeypatch):
    """Names of the kernels that Triton was made to compile, in a process that has none yet."""
    from triton.runtime.jit import JITFunction

    names: list[str] = []

    def compile_nothing(self, key, signature, device, *rest):
        names.append(self.fn.__name__)
        kernel = SimpleNamespace(
            function=0,
            packed_metadata=(),
            launch_metadata=lambda *_: None,
            run=lambda *_: None,
            result=lambda: kernel,
        )
        self.device_caches[device][0][key] = kernel
        return kernel

    cpu_gpu(monkeypatch)
    monkeypatch.setenv("MPASS_STRICT", "1")
    monkeypatch.setattr(JITFunction, "_do_compile", compile_nothing)
    monkeypatch.setattr(dry_run, "_constants", {})
    source.loaded.cache_clear()
    yield names
    source.loaded.cache_clear()


def tensors(queries, keys, *, device="cpu", heads=8):
    """Query as projections give it; value a slice of a wider tensor, at an odd address."""
    query = torch.empty(2, queries, heads, 64, dtype=torch.half, device=device).transpose(1, 2)
    key = torch.empty(2, heads // 2, keys, 64, dtype=torch.half, device=device)
    value = torch.empty(2, heads // 2, keys, 67, dtype=torch.half, device=device)[..., 3:]
    return query, key, value


def run_layer(cls, query, key, value, mask):
    heads = range(query.shape[1])
    inputs = EstimateInputs(query, key, mask, heads, 0.2)
    index = cls.estimate(inputs, [cls()] * len(heads))
    lowering = device_lowering(query.device)
    lowering.sparse_attention(AttentionInputs(query, key, value, mask, 0.2), index)


def foresee(cls, mask):
    """What a layer of 300 keys is prepared with, from fake tensors like the real ones."""

    def work():
        with FakeTensorMode() as mode:
            seen = AttentionMask(
                mask.causal,
                mask.query_offset,
                mask.window,
                None if mask.key_mask is None else mode.from_tensor(mask.key_mask),
            )
            run_layer(cls, *tensors(300 - mask.query_offset, 300), seen)

    return prepare.prepare(work)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", WITH_KERNELS)
def test_the_first_call_compiles_nothing_and_writes_no_integers(name, mask, compiled):
    cls = registered_patterns()[name]
    builds = foresee(cls, mask)
    assert compiled == []
    for build in builds:
        build.run()
    ahead = Counter(compiled)
    assert ahead["sparse_attention"] == 1 and "write_ints" not in ahead
    compiled.clear()
    query, key, value = tensors(300 - mask.query_offset, 300)
    for tensor in (query, key, value):
        tensor.normal_()
    run_layer(cls, query, key, value, mask)
    assert compiled == []


def test_a_layer_like_an_earlier_one_is_foreseen_too(compiled):
    """Its integers are on the device already; those are no tensors for a run on fake ones."""
    with FakeTensorMode():
        fakes = tensors(300, 300)
        for _ in range(2):
            builds = prepare.prepare(lambda: run_layer(mpass.Union, *fakes, AttentionMask()))
    assert {"list_blocks", "sparse_attention"} <= {b.name.split(".")[1] for b in builds}


def test_triton_finds_what_it_has_compiled_ahead(monkeypatch):
    cpu_gpu(monkeypatch)
    with dry_run.dry_run() as run, FakeTensorMode():
        run_layer(mpass.AShape, *tensors(300, 300), AttentionMask())
    foreseen = next(one for one in run.launches if one.kernel == "plan_rows")
    function = source.load(foreseen.spec).plan_rows
    function.device_caches.clear()
    prepare.compile_launch(foreseen)
    (kernels, *_), *others = function.device_caches.values()
    (made,) = kernels.values()
    assert not others and made.asm["cubin"]

    def launched(spec, kernel, grid, **arguments):
        if kernel == "plan_rows":
            arguments |= direct.launch_options(spec)
            assert function.run(grid=grid, warmup=True, **arguments) is made
            assert list(kernels.values()) == [made]

    monkeypatch.setattr(attention, "launch", launched)
    run_layer(mpass.AShape, *tensors(300, 300), AttentionMask())
    function.device_caches.clear()


def test_integers_that_nobody_foresaw_are_written_by_a_launch(compiled):
    device = torch.device("cpu")
    launch.device_ints([3, 1, 4], device)
    assert compiled == ["write_ints"]
    dry_run.keep_constants([((3, 1, 4), device)])
    compiled.clear()
    source.loaded.cache_clear()
    known = launch.device_ints([3, 1, 4], device)
    assert compiled == [] and known.tolist() == [3, 1, 4] and known.dtype == torch.int32
    assert launch.device_ints([3, 1, 4], device).data_ptr() == known.data_ptr()


def test_nothing_is_made_while_a_graph_is_captured(compiled, monkeypatch):
    monkeypatch.setattr(prepare, "capturing", lambda: True)
    foresee(mpass.VerticalSlash, AttentionMask())
    assert dry_run._constants == {}


def test_a_second_call_lists_no_rules_again(compiled, monkeypatch):
    """A GPU waits for a host that works out what it has worked out before."""
    listed = []
    old = union.vertical_block_list_rule
    monkeypatch.setattr(
        union, "vertical_block_list_rule", lambda *of: listed.append(of) or old(*of)
    )
    union.groups_of.cache_clear()
    tensors_of_call = tensors(300, 300)
    run_layer(mpass.Union, *tensors_of_call, AttentionMask())
    assert len(listed) == 8
    run_layer(mpass.Union, *tensors_of_call, AttentionMask())
    assert len(listed) == 8


def test_calls_make_nothing_that_outlives_them(compiled):
    query, key, value = tensors(300, 300)
    run_layer(mpass.Union, query, key, value, AttentionMask())
    assert "write_ints" in compiled and dry_run._constants == {}


def test_compiling_a_program_prepares_its_layers(compiled):
    started: list[threading.Thread] = []
    start_kernels = warm_up.start_kernels

    def watched(plans):
        started.extend(start_kernels(plans))
        return started

    def program(query, key, value):
        once = torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )
        return torch.nn.functional.scaled_dot_product_attention(
            once, key, value, is_causal=True, enable_gqa=True
        )

    inputs = [tensor.normal_() for tensor in tensors(300, 300)]
    ahead: list[str] = []

    def backend_done(*_):
        for thread in started:
            thread.join(60)
        ahead.extend(compiled)
        compiled.clear()

    options = {"pattern": "union", "min_seq_len": 128, "inner_backend": "eager"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mpass.backend.start_kernels", watched)
        patch.setattr("mpass.backend.keep_graph", backend_done)
        torch._dynamo.reset()
        with torch.no_grad():
            torch.compile(program, backend="minference", options=options)(*inputs)
    # Layers that are the same are foreseen once; the second reads what the first has made.
    assert ahead.count("score_rows") == 1 and "sparse_attention" in ahead
    assert compiled == []


def test_a_trained_program_finds_its_gradients_compiled(compiled, monkeypatch):
    """Over the chosen keys and over every key, for a call may decide for either."""
    started: list[threading.Thread] = []
    start_kernels = warm_up.start_kernels
    monkeypatch.setattr(
        "mpass.backend.start_kernels", lambda plans: started.extend(start_kernels(plans)) or started
    )

    def program(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    inputs = [tensor.normal_().detach().requires_grad_() for tensor in tensors(300, 300)]
    options = {"pattern": "union", "min_seq_len": 128, "training": "sparse", "dense_above": 1.0}
    torch._dynamo.reset()
    out = torch.compile(program, backend="minference", options=options)(*inputs)
    for thread in started:
        thread.join(60)
    assert {"query_gradients", "key_gradients", "column_gradients"} <= set(compiled)
    compiled.clear()
    out.sum().backward()
    assert compiled == []


def test_a_launch_waits_for_the_thread_that_compiles_its_kernel():
    spec = TritonKernelSpec("ints", num_warps=1)
    begun, go_on, order = threading.Event(), threading.Event(), []

    def build():
        with building.compiling(spec, "write_ints"):
            begun.set()
            go_on.wait(10)
            order.append("built")

    def wait_and_launch():
        building.wait_for(spec, "write_ints")
        order.append("launched")

    builder, waiter = (threading.Thread(target=run) for run in (build, wait_and_launch))
    builder.start()
    assert begun.wait(10)
    waiter.start()
    building.wait_for(spec, "another")
    go_on.set()
    for thread in (builder, waiter):
        thread.join(10)
    assert order == ["built", "launched"]
    assert not building._compiling


def test_a_kernel_that_cannot_be_compiled_ahead_is_waited_for_by_nobody(compiled, monkeypatch):
    def fail(launch):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(prepare, "compile_launch", fail)
    for build in foresee(mpass.AShape, AttentionMask()):
        with pytest.raises(RuntimeError):
            build.run()
    assert not building._compiling


MOST = {
    "a_shape": (3, 20),
    "block_max": (5, 3),
    "block_sparse": (6, 4),
    "block_top_p": (5, 3),
    "dense": (2, 3),
    "flex_prefill": (3, 186),
    "sample_attention": (5, 47),
    "strided": (3, 41),
    "tri_shape": (3, 43),
    "union": (9, 8),
    "vertical_slash": (8, 11),
    "x_attention": (5, 3),
}
"""Of each pattern, the launches of own kernels in a layer, and those of torch ops at most."""


@pytest.mark.parametrize("name", WITH_KERNELS)
def test_a_layer_launches_no_more_than_it_did(name, monkeypatch):
    device = meta_gpu(monkeypatch)
    cls = registered_patterns()[name]
    with Watched() as ops, dry_run.dry_run() as run:
        run_layer(cls, *tensors(4096, 4096, device=device, heads=32), AttentionMask())
    own, others = MOST[name]
    assert len(run.launches) == own, [launch.kernel for launch in run.launches]
    assert ops.launches <= others, ops.ops
    assert LOWERING.builds_ahead
