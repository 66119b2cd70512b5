"""Generated C++ estimators against the plain-torch ones: the same index."""

from __future__ import annotations

import pytest
import torch
from mpass.lowering import cpu, estimate
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name
from mpass.lowering.index import AttentionMask

from tests.cpu_cases import CASES, assert_same_index, needs_kernels

pytestmark = needs_kernels

# name: num_queries, num_keys, offset, window, padding, causal
SHAPES = {
    "short": (30, 30, 0, 0, False, True),
    "two_chunks": (5000, 5000, 0, 0, False, True),
    "chunk_after_cache": (200, 700, 500, 0, False, True),
    "window_padding_chunk": (200, 690, 490, 150, True, True),
    "padding": (300, 300, 0, 0, True, True),
    "bidirectional": (300, 300, 0, 0, False, False),
}


def inputs(shape: str, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, AttentionMask]:
    num_queries, num_keys, offset, window, padding, causal = SHAPES[shape]
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(2, num_queries, 4, 64, generator=generator).transpose(1, 2)
    key = torch.randn(2, 2, num_keys, 64, generator=generator)
    key_mask = None
    if padding:
        key_mask = torch.rand(2, num_keys, generator=generator) > 0.1
        key_mask[0, :50] = False
        key_mask[1, -20:] = False
    return query.to(dtype) * 2, key.to(dtype) * 2, AttentionMask(causal, offset, window, key_mask)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "instruction_set"), CASES)
def test_vertical_slash_equals_plain_torch(
    shape: str, dtype: torch.dtype, instruction_set: str
) -> None:
    query, key, mask = inputs(shape, dtype)
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set, kernel="estimate")
    budgets = {"vertical_sizes": [200, 31, 64, 100], "slash_sizes": [150, 300, 110, 5]}
    heads = [0, 1, 3, 2]
    expected = estimate.vertical_slash_index(query, key, mask, heads, scale=0.125, **budgets)
    found = cpu.vertical_slash_index(query, key, mask, heads, scale=0.125, **budgets, spec=spec)
    assert_same_index(found, expected)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "instruction_set"), CASES)
def test_block_top_k_equals_plain_torch(
    shape: str, dtype: torch.dtype, instruction_set: str
) -> None:
    query, key, mask = inputs(shape, dtype)
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set, kernel="estimate")
    sizes = {"top_k": [3, 2, 5], "block_sizes": [64, 128, 256]}
    expected = estimate.block_top_k_index(query, key, mask, [0, 3, 1], **sizes)
    found = cpu.block_top_k_index(query, key, mask, [0, 3, 1], **sizes, spec=spec)
    assert_same_index(found, expected)


def test_equal_scores_go_to_the_first_keys() -> None:
    query, key = torch.zeros(1, 1, 640, 64), torch.zeros(1, 1, 640, 64)
    budgets = {"vertical_sizes": [40], "slash_sizes": [130]}
    index = cpu.vertical_slash_index(query, key, AttentionMask(), [0], scale=1.0, **budgets)
    # The last 64 keys are seen by fewer of the last queries, the rest by all, equally.
    assert index.column_index[0, 0].tolist() == list(range(40))
    blocks = cpu.block_top_k_index(query, key, AttentionMask(), [0], top_k=[3], block_sizes=[64])
    assert blocks.block_index[0, 0, 9, :3].tolist() == [0, 1, 9]


def test_estimators_do_not_depend_on_the_number_of_threads() -> None:
    query, key, mask = inputs("two_chunks", torch.bfloat16)
    budgets = {"vertical_sizes": [200, 300], "slash_sizes": [150, 300]}
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu.vertical_slash_index(query, key, mask, [0, 3], scale=0.125, **budgets))
    finally:
        torch.set_num_threads(before)
    assert_same_index(found[1], found[0])
    assert_same_index(found[2], found[0])
