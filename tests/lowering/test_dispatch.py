"""Lowerings as objects: one discovery, one signature per estimator, and a device of one folder."""

from __future__ import annotations

import dataclasses
import inspect

import pytest
import torch

import mpass
from mpass.config.sparse_config import builtin_default
from mpass.lowering import dispatch
from mpass.lowering.device import REFERENCE, Lazy, Lowering
from mpass.lowering.estimators import ESTIMATORS, VERTICAL_SLASH
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.recorder import record
from mpass.lowering.reference import attention as reference
from tests.helpers.truth import random_attention

OWN = [(own.name, estimator) for own in dispatch.lowerings().values() for estimator in ESTIMATORS]


@pytest.mark.parametrize(("name", "estimator"), OWN, ids=lambda v: getattr(v, "name", v))
def test_every_implementation_has_the_signature_of_the_reference(name, estimator):
    implementation = dispatch.find_lowering(name).estimators[estimator]
    assert isinstance(implementation, Lazy)
    assert inspect.signature(implementation.load()) == inspect.signature(estimator.reference)


@pytest.mark.parametrize("own", dispatch.lowerings().values(), ids=lambda own: own.name)
@pytest.mark.parametrize("function", ["sparse_attention", "dense_attention"])
def test_attention_of_every_lowering_has_the_signature_of_the_reference(own, function):
    found = getattr(own, function)
    found = found.load() if isinstance(found, Lazy) else found
    assert inspect.signature(found) == inspect.signature(getattr(REFERENCE, function))


@pytest.mark.parametrize("own", dispatch.lowerings().values(), ids=lambda own: own.name)
def test_every_function_of_a_lowering_can_be_loaded(own):
    lazy = [getattr(own, field.name) for field in dataclasses.fields(own)]
    for function in (*lazy, *own.estimators.values()):
        if isinstance(function, Lazy):
            assert callable(function.load())


def test_lowerings_are_found_by_their_folders():
    assert set(dispatch.lowerings()) == {"cpu", "cuda"}
    assert dispatch.find_lowering("triton").device == "cuda"
    assert dispatch.device_lowering("mps") is REFERENCE
    with pytest.raises(KeyError):
        dispatch.find_lowering("nothing")


def toy_lowering(**policy):
    """A lowering for CPU tensors that counts how often it is asked; all it does is plain torch."""
    calls = []

    def sparse_attention(inputs, index):
        calls.append("attention")
        return reference.sparse_attention(inputs, index)

    def vertical_slash_index(inputs, rules):
        calls.append("estimate")
        return VERTICAL_SLASH.reference(inputs, rules)

    def serves(inputs):
        return "the toy takes float32" if inputs.query.dtype != torch.float32 else None

    toy = Lowering(
        name="toy",
        device="cpu",
        serves=serves,
        sparse_attention=sparse_attention,
        estimators={VERTICAL_SLASH: vertical_slash_index},
        **policy,
    )
    return toy, calls


@pytest.fixture
def register(monkeypatch):
    """`register_lowering` whose effect ends with the test."""
    monkeypatch.setattr(dispatch, "_added", {})
    return dispatch.register_lowering


def test_a_registered_lowering_serves_its_device(register):
    toy, calls = toy_lowering(default_pattern="a_shape", shortest_prompt=7)
    query, key, value = random_attention(num_queries=200)
    pattern = mpass.VerticalSlash(40, 120)
    expected = mpass.computed_mask(query, key, pattern=pattern)
    register(toy)
    calls.clear()
    out = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
    assert calls == ["estimate", "attention"]
    assert torch.equal(mpass.computed_mask(query, key, pattern=pattern), expected)
    assert out.shape == (1, 4, 200, 32)
    assert builtin_default("cpu") == mpass.AShape()
    # What it has no estimator for, and what it does not serve, plain torch takes.
    mpass.sparse_attention(query, key, value, pattern="a_shape", enable_gqa=True)
    half = AttentionInputs(*(t.half() for t in (query, key, value)), AttentionMask(), 1.0)
    assert dispatch.choose_lowering(half) is REFERENCE
    assert dispatch.reason_against(half) == "the toy takes float32"


def test_what_a_lowering_does_not_serve_is_dense_unless_dense_is_forbidden(register):
    toy, calls = toy_lowering()
    register(toy)
    query, key, value = (tensor.half() for tensor in random_attention(num_queries=200))
    calls.clear()
    with record() as log:
        for dense_above in (0.6, 1.0):
            mpass.attend(query, key, value, patterns="vertical_slash", dense_above=dense_above)
    assert calls == []
    assert [(call.lowering, call.reason) for call in log.calls] == [
        ("dense", "the toy takes float32"),
        ("reference", ""),
    ]


def test_compiled_programs_ask_the_lowering_of_the_device(register):
    toy, calls = toy_lowering(shortest_prompt=64, default_pattern="vertical_slash")
    register(toy)

    def attend(query, key, value):
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, is_causal=True, enable_gqa=True
        )

    query, key, value = random_attention(num_queries=200)
    torch._dynamo.reset()
    options = {"inner_backend": "eager"}
    compiled = torch.compile(attend, backend="minference", options=options)
    with record() as log, torch.no_grad():
        out = compiled(query, key, value)
        half = compiled(query.half(), key.half(), value.half())
    # Sparse from its shortest prompt on, by its default pattern; nothing is decided by cost.
    assert calls == ["estimate", "attention"]
    assert [call.lowering for call in log.calls] == ["toy"]
    assert (out - attend(query, key, value)).abs().max() < 1e-5
    assert torch.equal(half, attend(query.half(), key.half(), value.half()))
    assert "the toy takes float32" in str(mpass.last_report())
    torch._dynamo.reset()
