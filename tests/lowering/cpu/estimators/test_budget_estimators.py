"""Generated C++ estimators against the plain-torch ones: the same index, but for near ties."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering.cpu import estimators as cpu
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, instruction_sets
from mpass.lowering.index import AttentionMask, SparseIndex, num_key_blocks
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import vertical_slash as estimate
from mpass.lowering.reference.block_sparse import BlockSparseRule, block_sparse_index
from mpass.lowering.reference.selection import first_keys
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from tests.helpers.cpu_cases import DTYPES, assert_same_index, estimating_with, needs_kernels
from tests.helpers.pairwise import pairwise

pytestmark = needs_kernels

NEAR = 2e-3
"""Sums that differ by less, relatively, may change places: weights are kept as fp16."""

# name: num_queries, num_keys, offset, window, padding, causal
SHAPES = {
    "short": (30, 30, 0, 0, False, True),
    "two_chunks": (5000, 5000, 0, 0, False, True),
    "chunk_after_cache": (200, 700, 500, 0, False, True),
    "window_padding_chunk": (200, 690, 490, 150, True, True),
    "padding": (300, 300, 0, 0, True, True),
    "bidirectional": (300, 300, 0, 0, False, False),
}
CASES = pairwise(SHAPES, DTYPES, instruction_sets())


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


def rounded(tensor: torch.Tensor, spec: KernelSpec) -> torch.Tensor:
    """What the estimators of a spec multiply."""
    return tensor.to(torch.bfloat16) if spec.bf16 else tensor


def rules_of(vertical_sizes: list[int], slash_sizes: list[int]) -> list[VerticalSlashRule]:
    return [VerticalSlashRule(*sizes) for sizes in zip(vertical_sizes, slash_sizes, strict=True)]


def around_the_budget(sums: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Which of the sums [N] must be among the `size` largest, and which may be: bool [N] each."""
    least = sums.sort(descending=True).values[min(size, len(sums)) - 1]
    return sums > least * (1 + NEAR), sums >= least * (1 - NEAR)


def assert_keeps_the_largest(
    index: SparseIndex,
    sums: tuple[torch.Tensor, torch.Tensor],
    mask: AttentionMask,
    vertical_sizes: list[int],
    slash_sizes: list[int],
) -> None:
    """Columns and block diagonals of all heads against the sums [B, h, Nk] of both kinds."""
    num_keys = sums[0].shape[-1]
    starts = first_keys(mask, len(sums[0]), sums[0].device)
    for b, start in enumerate(starts.tolist()):
        for h, (columns, diagonals) in enumerate(zip(vertical_sizes, slash_sizes, strict=True)):
            scores = sums[0][b, h].clone()
            scores[start : start + estimate.SINK_COLUMNS] = torch.inf
            size = min(num_keys, max(estimate.SINK_COLUMNS, columns))
            assert index.column_count[b, h] == size
            kept = torch.zeros(num_keys, dtype=torch.bool)
            kept[index.column_index[b, h, :size]] = True
            sure, possible = around_the_budget(scores, size)
            assert kept[sure].all() and possible[kept].all()

            scores = sums[1][b, h].clone()
            scores[: estimate.LOCAL_DIAGONALS] = torch.inf
            inside = torch.arange(num_keys) < (mask.window or num_keys)
            size = max(estimate.LOCAL_DIAGONALS, diagonals)
            kept = torch.zeros(num_key_blocks(num_keys) + 1, dtype=torch.bool)
            kept[index.diagonal_index[b, h, : index.diagonal_count[b, h]]] = True
            for chosen, subset in zip(around_the_budget(scores, size), (True, False), strict=True):
                blocks = estimate.block_diagonals((chosen & inside)[None, None])[0, 0]
                assert (kept[blocks] if subset else blocks[kept]).all()


@pytest.mark.parametrize(("shape", "dtype", "instruction_set"), CASES, ids=str)
def test_vertical_slash_equals_plain_torch(
    shape: str, dtype: torch.dtype, instruction_set: str
) -> None:
    query, key, mask = inputs(shape, dtype)
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set, kernel="fixed_budget")
    budgets = {"vertical_sizes": [200, 31, 64, 100], "slash_sizes": [150, 300, 110, 5]}
    heads = [0, 1, 3, 2]
    with estimating_with(spec):
        found = cpu.vertical_slash_index(
            EstimateInputs(query, key, mask, heads, 0.125), rules_of(**budgets)
        )
    given = EstimateInputs(rounded(query, spec), rounded(key, spec), mask, heads, 0.125)
    sums = estimate.last_query_sums(given)
    assert_keeps_the_largest(found, sums, mask, **budgets)


@pytest.mark.parametrize(("shape", "dtype", "instruction_set"), CASES, ids=str)
def test_block_top_k_equals_plain_torch(
    shape: str, dtype: torch.dtype, instruction_set: str
) -> None:
    query, key, mask = inputs(shape, dtype)
    spec = KernelSpec(dtype_name(dtype), 64, 64, instruction_set, kernel="fixed_budget")
    rules = [BlockSparseRule(3, 64), BlockSparseRule(2, 128), BlockSparseRule(5, 256)]
    given = EstimateInputs(query, key, mask, [0, 3, 1], 1.0)
    expected = block_sparse_index(given, rules)
    with estimating_with(spec):
        found = cpu.block_sparse_index(given, rules)
    assert_same_index(found, expected)


def test_equal_scores_go_to_the_first_keys() -> None:
    query, key = torch.zeros(1, 1, 640, 64), torch.zeros(1, 1, 640, 64)
    given = EstimateInputs(query, key, AttentionMask(), [0], 1.0)
    index = cpu.vertical_slash_index(given, [VerticalSlashRule(40, 130)])
    # The last 64 keys are seen by fewer of the last queries, the rest by all, equally.
    assert index.column_index[0, 0].tolist() == list(range(40))
    blocks = cpu.block_sparse_index(given, [BlockSparseRule(3, 64)])
    assert blocks.block_index[0, 0, 9, :3].tolist() == [0, 1, 9]


def test_estimators_do_not_depend_on_the_number_of_threads() -> None:
    query, key, mask = inputs("two_chunks", torch.bfloat16)
    given = EstimateInputs(query, key, mask, [0, 3], 0.125)
    rules = rules_of([200, 300], [150, 300])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(cpu.vertical_slash_index(given, rules))
    finally:
        torch.set_num_threads(before)
    assert_same_index(found[1], found[0])
    assert_same_index(found[2], found[0])
