"""One kernel serves every length: what a prompt's length may not decide is the code of a kernel.

The launchers run on tensors without memory (device "meta"), so that a million tokens cost nothing.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.triton import (
    attention,
    block_scores,
    block_sparse,
    launch,
    list_blocks,
    pooled_keys,
    sample_attention,
    source,
    union,
    vertical_slash,
    x_attention,
)
from mpass.lowering.triton.flex_prefill import flex_prefill_index
from mpass.patterns.base import find_pattern

LENGTHS = [1024, 8192, 131072, 1 << 20, 1 << 22]
"""Tokens; four million are more blocks than one program ever held in registers."""

ESTIMATORS = {
    "block_sparse": block_sparse.block_sparse_index,
    "block_max": block_scores.block_scores_index,
    "block_top_p": block_scores.block_scores_index,
    "flex_prefill": flex_prefill_index,
    "sample_attention": sample_attention.sample_attention_index,
    "union": union.vertical_block_index,
    "vertical_slash": vertical_slash.vertical_slash_index,
    "x_attention": x_attention.x_attention_index,
}

LAUNCHERS = [
    attention,
    block_scores,
    block_sparse,
    launch,
    list_blocks,
    pooled_keys,
    sample_attention,
    union,
    vertical_slash,
    x_attention,
]
"""Modules that launch kernels."""


@dataclasses.dataclass(frozen=True)
class Pointer:
    """A tensor as Triton sees it when it chooses a kernel's code."""

    dtype: torch.dtype
    address: int

    def data_ptr(self) -> int:
        return self.address


@functools.cache
def binder(function: Any) -> Any:
    """What makes Triton's key of a kernel's code from arguments."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    return create_function_from_signature(function.signature, function.params, backend)


def kernel_key(spec: Any, kernel: str, arguments: dict[str, Any]) -> tuple[Any, ...]:
    """What decides a kernel's machine code: its text, and how its arguments are specialised."""
    function = getattr(source.load(spec), kernel)
    values = {
        name: Pointer(value.dtype, 16 + value.storage_offset() * value.element_size())
        if isinstance(value, Tensor)
        else value
        for name, value in arguments.items()
    }
    _, specialisation, _ = binder(function)(**values)
    return source.render(spec), kernel, *map(str, specialisation)


@pytest.fixture
def launched(monkeypatch) -> set[tuple[Any, ...]]:
    """The kernels that launchers ask for, by `kernel_key`; nothing runs."""
    keys: set[tuple[Any, ...]] = set()

    def record(spec: Any, kernel: str, grid: tuple[int, ...], /, **arguments: Any) -> None:
        if 0 not in grid:
            keys.add(kernel_key(spec, kernel, arguments))

    for module in LAUNCHERS:
        monkeypatch.setattr(module, "launch", record)
    monkeypatch.setattr(launch, "_target_of_device", lambda _: "sm_90")
    # A turn asks for what every turn asks for, and a million tokens have hundreds.
    monkeypatch.setattr(list_blocks, "SCORE_BYTES", 1 << 42)
    monkeypatch.setattr(x_attention, "GROUP_BYTES", 1 << 42)
    return keys


def tensors(length: int, heads: int = 2) -> tuple[Tensor, Tensor]:
    """Query and key of bfloat16 without memory, of head size 128."""
    query = torch.empty(1, heads, length, 128, dtype=torch.bfloat16, device="meta")
    return query, torch.empty_like(query)


def default_rule(name: str) -> Any:
    """What the estimator of a pattern takes for one head, of the pattern's default fields."""
    pattern: Any = find_pattern(name)()
    if hasattr(pattern, "rule"):
        return pattern.rule()
    return pattern.estimator.rule(**pattern.parameters())


@pytest.mark.parametrize("name", ESTIMATORS)
@pytest.mark.parametrize("masked", [False, True], ids=["causal", "window and padding"])
def test_the_kernels_of_an_estimator_do_not_depend_on_the_length(name, masked, launched):
    rules = [default_rule(name)] * 2
    asked = []
    for length in LENGTHS:
        launched.clear()
        mask = AttentionMask()
        if masked:
            key_mask = torch.empty(1, length, dtype=torch.bool, device="meta")
            mask = AttentionMask(window=600, key_mask=key_mask)
        ESTIMATORS[name](EstimateInputs(*tensors(length), mask, [0, 1], 0.1), rules)
        asked.append(set(launched))
    assert asked[0]
    assert all(keys == asked[0] for keys in asked[1:])


@pytest.mark.parametrize("name", ["union", "vertical_slash"])
def test_strides_beyond_32_bits_ask_for_the_same_kernels(name, launched):
    # 32 heads of 524288 tokens: a batch row has 2^31 numbers.
    rules = [default_rule(name)]
    asked = []
    for length in (4096, 524288):
        launched.clear()
        query, key = tensors(length, heads=32)
        assert (query.stride(0) >= 1 << 31) == (length == 524288)
        ESTIMATORS[name](EstimateInputs(query, key, AttentionMask(), [0], 0.1), rules)
        asked.append(set(launched))
    assert asked[0] == asked[1]


def test_attention_beyond_32_bits_asks_for_the_same_kernels(launched):
    rules = [default_rule("union")] * 32
    asked = []
    for length in (4096, 524288):
        query, key = tensors(length, heads=32)
        inputs = EstimateInputs(query, key, AttentionMask(), range(32), 0.1)
        index = union.vertical_block_index(inputs, rules)
        launched.clear()
        attention.sparse_attention(AttentionInputs(query, key, key, AttentionMask(), 0.1), index)
        asked.append(set(launched))
    assert asked[0]
    assert asked[0] == asked[1]
