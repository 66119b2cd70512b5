"""`sparse_attention` and its companions refuse what they cannot compute, in words of the caller."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import mpass
from mpass.errors import (
    DeviceError,
    GradientError,
    OptionValueError,
    PatternValueError,
    TensorTypeError,
    TooLargeError,
    UnknownPatternError,
)


def make(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("function", [mpass.sparse_attention, mpass.density, mpass.computed_mask])
def test_a_pattern_may_be_text_with_parameters(function):
    query = make(1, 2, 256, 16)
    inputs = (query, query, query)[: 3 if function is mpass.sparse_attention else 2]
    by_text = function(*inputs, pattern="a_shape(64, 128)")
    assert torch.equal(by_text, function(*inputs, pattern=mpass.AShape(64, 128)))
    assert not torch.equal(by_text, function(*inputs, pattern="a_shape(0, 64)"))


@pytest.mark.parametrize(
    ("pattern", "error", "words"),
    [
        (["a_shape", "dense"], OptionValueError, "a_shape"),
        (mpass.AShape, OptionValueError, r"AShape\(\)"),
        (None, OptionValueError, "text such as"),
        ("a_shape(-1)", PatternValueError, "a_shape"),
        ("a_shap", UnknownPatternError, "a_shape"),
    ],
)
def test_a_wrong_pattern_is_named(pattern, error, words):
    query = make(1, 2, 64, 16)
    with pytest.raises(error, match=words):
        mpass.sparse_attention(query, query, query, pattern=pattern)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_arrays_are_no_tensors(at):
    inputs = [make(1, 2, 64, 16) for _ in range(3)]
    inputs[at] = np.zeros((1, 2, 64, 16), np.float32)
    name = ("query", "key", "value")[at]
    with pytest.raises(TensorTypeError, match=rf"{name} is a numpy\.ndarray"):
        mpass.sparse_attention(*inputs, pattern="a_shape")


@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_gradient_is_not_lost_in_silence(at):
    inputs = [make(1, 2, 64, 16) for _ in range(3)]
    inputs[at].requires_grad_()
    with pytest.raises(GradientError, match=("query", "key", "value")[at]):
        mpass.sparse_attention(*inputs, pattern="a_shape")
    with torch.no_grad():
        mpass.sparse_attention(*inputs, pattern="a_shape")


def test_a_mask_that_would_fill_the_memory_is_refused():
    query = torch.zeros(1, 1, 1, 16).expand(1, 1, 100_000, 16)
    with pytest.raises(TooLargeError, match=r"100000 x 100000 tokens.*mpass\.density"):
        mpass.computed_mask(query, query, pattern="a_shape")


def test_tensors_of_two_devices_are_refused():
    query = make(1, 2, 64, 16)
    with pytest.raises(DeviceError, match="meta"):
        mpass.sparse_attention(query, query.to("meta"), query, pattern="a_shape")
