"""Kernels are built while the rest of the graph is compiled, several at a time."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

import mpass
from mpass import warm_up
from mpass.lowering.cpu import LOWERING, library
from tests.helpers.cpu_cases import needs_kernels

KINDS = (warm_up.start_attention, warm_up.start_estimator, warm_up.start_training)


@pytest.fixture(autouse=True)
def nothing_started() -> Iterator[None]:
    for function in KINDS:
        function.cache_clear()
    yield
    for function in KINDS:
        function.cache_clear()


def model(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True)


@needs_kernels
def test_compiling_a_graph_builds_its_kernels_at_the_same_time(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Both compilers must be at work at once to get past the barrier; its breaking is an error.
    together = threading.Barrier(2, timeout=60)
    passed: list[str] = []
    original = library.compile_source

    def compile_source(source: str, *, extra_flags: tuple[str, ...] = ()) -> object:
        here = threading.current_thread()
        if source != library.PROBE_SOURCE and here is not threading.main_thread():
            together.wait()
            passed.append(here.name)
        return original(source, extra_flags=extra_flags)

    monkeypatch.setattr(library, "compile_source", compile_source)
    library.load_library.cache_clear()
    started: list[threading.Thread] = []
    start_kernels = warm_up.start_kernels

    def watched(plans):  # runs inside of Dynamo
        started.extend(start_kernels(plans))
        return started

    monkeypatch.setattr("mpass.backend.start_kernels", watched)
    options = {"pattern": mpass.VerticalSlash(4, 8), "min_seq_len": 128, "inner_backend": "eager"}
    torch._dynamo.reset()
    x = torch.randn(1, 2, 200, 24)
    torch.compile(model, backend="minference", options=options)(x)
    for thread in started:
        thread.join(120)
    assert sorted(name.split(",")[0] for name in passed) == [
        "mpass: attention",
        "mpass: vertical_slash",
    ]


def test_each_kernel_is_started_once(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    monkeypatch.setattr(
        warm_up, "start", lambda run, name: names.append(name) or threading.Thread(name=name)
    )
    for _ in range(2):
        warm_up.start_attention(LOWERING, torch.float32, 24, 24, 0.0)
        warm_up.start_estimator(LOWERING, mpass.VerticalSlash, torch.float32, 24)
        warm_up.start_estimator(LOWERING, mpass.Union, torch.float32, 24)
    assert len(names) == len(set(names)) == 3


def test_a_failure_in_the_background_stays_there() -> None:
    def fail() -> None:
        raise RuntimeError("no compiler")

    thread = warm_up.start(fail, "kernel")
    thread.join(10)
    assert not thread.is_alive()
    assert thread.daemon


@needs_kernels
def test_gradients_are_built_where_a_model_is_trained(monkeypatch: pytest.MonkeyPatch) -> None:
    names: list[str] = []
    start = warm_up.start

    def watched(run, name):
        names.append(name.split(",")[0])
        return start(run, name)

    monkeypatch.setattr(warm_up, "start", watched)
    options = {"min_seq_len": 128, "inner_backend": "eager", "training": "sparse"}
    for needs_gradient in (False, True):
        torch._dynamo.reset()
        x = torch.randn(1, 2, 200, 24, requires_grad=needs_gradient)
        torch.compile(model, backend="minference", options=options)(x)
        assert ("gradients" in names) == needs_gradient
