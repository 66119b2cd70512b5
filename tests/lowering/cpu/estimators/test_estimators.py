"""Generated C++ estimators of lists against the plain-torch ones: the same but for near ties."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpass.lowering.cpu import estimators as lists
from mpass.lowering.cpu import library
from mpass.lowering.cpu.spec import KernelSpec
from mpass.lowering.cpu.support import dtype_name, instruction_sets
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference import block_scores as reference_block_scores
from mpass.lowering.reference import flex_prefill as reference_flex_prefill
from mpass.lowering.reference import sample_attention as reference_sample_attention
from mpass.lowering.reference import union as reference_union
from mpass.lowering.reference import x_attention as reference_x_attention
from mpass.patterns.block_max import BlockMax
from mpass.patterns.block_top_p import BlockTopP
from mpass.patterns.flex_prefill import FlexPrefill
from mpass.patterns.sample_attention import SampleAttention
from mpass.patterns.union import Union
from mpass.patterns.x_attention import XAttention
from tests.helpers.cpu_cases import (
    DTYPES,
    assert_same_index,
    estimating_with,
    kernels_of_today,
    needs_kernels,
)
from tests.helpers.pairwise import pairwise
from tests.helpers.rotation import part_of_today
from tests.lowering.cpu.test_source import EMULATED_TILES

pytestmark = needs_kernels

DIM, SCALE = 40, 0.25

# kernel: generated function, plain function, rules that differ in what they bind
ESTIMATORS: dict[str, tuple[Callable[..., SparseIndex], Callable[..., SparseIndex], list[Any]]] = {
    "union": (
        lists.vertical_block_index,
        reference_union.vertical_block_index,
        [
            Union(0.6, 1.0, 33, last_queries=32).rule(),
            Union(0.6, 0.1, 0, 2, 1, rows=64, pool=64).rule(),
            Union(0.5, 0.2, 17, 0, 1, 1, rows=8, pool=4, max_blocks=5, last_queries=16).rule(),
            Union(0.7, 0.05, 200, rows=1, pool=1).rule(),
        ],
    ),
    "block_scores": (
        lists.block_scores_index,
        reference_block_scores.block_scores_index,
        [
            BlockMax(0.5, 64, 1, 1, 1).rule(),
            BlockMax(0.9, 192, 1, 1, 3, 9).rule(),
            BlockTopP(0.4, 128, 2, 4, 2).rule(),
            BlockTopP(0.3, 64, 0, 1, 0, 4).rule(),
        ],
    ),
    "x_attention": (
        lists.x_attention_index,
        reference_x_attention.x_attention_index,
        [
            XAttention(0.6, 8, 128).rule(),
            XAttention(0.5, 16, 192, 0, 1, 1).rule(),
            XAttention(0.9, 4, 64, max_blocks=5).rule(),
            XAttention(0.5, 1, 128).rule(),
        ],
    ),
    "flex_prefill": (
        lists.flex_prefill_index,
        reference_flex_prefill.flex_prefill_index,
        [
            FlexPrefill(0.6, 0.0, 65, block_size=64).rule(),
            FlexPrefill(0.5, 1.0, 1, block_size=128).rule(),
            FlexPrefill(0.9, 0.1, 100, 300, block_size=192).rule(),
            FlexPrefill(1.0, 1.0, 64, block_size=64, max_blocks=5).rule(),
        ],
    ),
    "sample_attention": (
        lists.sample_attention_index,
        reference_sample_attention.sample_attention_index,
        [
            SampleAttention(0.5, 0.1, 0.1).rule(),
            SampleAttention(0.9, 1.0, 0.01, 9, 70).rule(),
            SampleAttention(0.8).rule(),
            SampleAttention(1.0, 0.001, 1.0).rule(),
        ],
    ),
}
HEADS = [3, 0, 2, 5]
ROOM = 2048
"""More than any key of these tests."""


def inputs(
    dtype: torch.dtype, *, batch: int, num_queries: int, num_keys: int, kv_heads: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Six query heads, laid out as projections give them."""
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, num_queries, 6, DIM, generator=generator).transpose(1, 2)
    key = torch.randn(batch, kv_heads, num_keys, DIM, generator=generator)
    return (query * 2).to(dtype), key.to(dtype)


def share_of_equal_lists(found: SparseIndex, expected: SparseIndex) -> float:
    """Share of the lists (of blocks, of columns) that are the same to the last entry."""
    if not found.block_count.numel():
        return 1.0  # columns by coverage end between near-equal ones: assert_nearly_the_same
    same = []
    for ours, theirs in zip(found.tensors(), expected.tensors(), strict=True):
        assert ours.shape == theirs.shape and ours.dtype == theirs.dtype
        equal = ours == theirs
        same.append((equal if ours is found.block_count else equal.all(-1)).flatten())
    return float(torch.cat(same).float().mean())


def assert_nearly_the_same(found: SparseIndex, expected: SparseIndex) -> None:
    """Of the entries of the lists of two indexes, 98% stand in both; in short lists all but a few:
    keys with less than 2^-24 of a query's attention may count as having none.
    """
    both = total = 0.0
    for count, entries in (("block_count", "block_index"), ("column_count", "column_index")):
        places = torch.arange(getattr(found, entries).shape[-1])
        tables = []
        for index in (found, expected):
            kept = places < getattr(index, count)[..., None]
            where = getattr(index, entries).long().masked_fill(~kept, ROOM - 1)
            tables.append(torch.zeros(*where.shape[:-1], ROOM).scatter_(-1, where, 1.0)[..., :-1])
        both += float((tables[0] * tables[1]).sum())
        total += float((tables[0] + tables[1]).sum()) / 2
    assert total - both <= 0.02 * total + 4


WINDOWS = [0, 1, 200]
PLACES = [(0, False), (63, True), (100, False)]
"""Position of the first query; whether keys are padding."""

KERNELS = kernels_of_today(itertools.product(DTYPES, instruction_sets()))
CASES = pairwise(
    ESTIMATORS,
    DTYPES,
    instruction_sets(),
    WINDOWS,
    PLACES,
    allowed=lambda name, dtype, instruction_set, *_: (dtype, instruction_set) in KERNELS,
)
SOURCES = list(itertools.product(ESTIMATORS, DTYPES, instruction_sets()))
"""Each makes another generated source."""


@pytest.mark.parametrize(
    ("kernel", "dtype", "instruction_set", "window", "place"),
    part_of_today(CASES, share=2),
    ids=str,
)
def test_generated_code_selects_what_plain_torch_selects(
    kernel: str, dtype: torch.dtype, instruction_set: str, window: int, place: tuple[int, bool]
) -> None:
    check_against_plain_torch(kernel, dtype, instruction_set, window, place)


@pytest.mark.slow
@pytest.mark.parametrize(("source", "window", "place"), pairwise(SOURCES, WINDOWS, PLACES), ids=str)
def test_every_generated_source_selects_what_plain_torch_selects(
    source: tuple[str, torch.dtype, str], window: int, place: tuple[int, bool]
) -> None:
    check_against_plain_torch(*source, window, place)


def check_against_plain_torch(
    kernel: str, dtype: torch.dtype, instruction_set: str, window: int, place: tuple[int, bool]
) -> None:
    offset, padded = place
    generated, plain, rules = ESTIMATORS[kernel]
    sizes = {"num_queries": 901 - offset, "num_keys": 901}
    query, key = inputs(dtype, batch=2, kv_heads=2, seed=1, **sizes)
    key_mask = None
    if padded:
        key_mask = torch.ones(2, 901, dtype=torch.bool)
        key_mask[0, :100] = False
        key_mask[1, -90:] = False
    mask = AttentionMask(query_offset=offset, window=window, key_mask=key_mask)
    spec = KernelSpec(dtype_name(dtype), DIM, DIM, instruction_set, kernel=kernel)
    with estimating_with(spec):
        found = generated(EstimateInputs(query, key, mask, HEADS, SCALE), rules)
    expected = plain(EstimateInputs(query, key, mask, HEADS, SCALE), rules)
    # With bf16 products, near-equal scores may change places.
    assert share_of_equal_lists(found, expected) >= (0.9 if spec.bf16 else 0.99)
    assert_nearly_the_same(found, expected)


@pytest.mark.parametrize("kernel", ["union", "block_scores", "sample_attention"])
@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("num_queries", [10, 901])
def test_attention_both_ways_selects_what_plain_torch_selects(
    kernel: str, padded: bool, num_queries: int
) -> None:
    generated, plain, rules = ESTIMATORS[kernel]
    query, key = inputs(
        torch.float32, batch=2, num_queries=num_queries, num_keys=901, kv_heads=2, seed=6
    )
    key_mask = None
    if padded:
        key_mask = torch.rand(2, 901, generator=torch.Generator().manual_seed(0)) < 0.8
        key_mask[0, :100] = False
        key_mask[1, -90:] = False
    mask = AttentionMask(causal=False, key_mask=key_mask)
    found = generated(EstimateInputs(query, key, mask, HEADS, SCALE), rules)
    expected = plain(EstimateInputs(query, key, mask, HEADS, SCALE), rules)
    assert share_of_equal_lists(found, expected) >= 0.85
    assert_nearly_the_same(found, expected)


@pytest.mark.parametrize("last_queries", [16, 32, 64])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "both ways"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_heads_that_look_at_keys_together_choose_as_each_alone_does(
    dtype: torch.dtype, causal: bool, last_queries: int
) -> None:
    query, key = inputs(dtype, batch=2, num_queries=300, num_keys=405, kv_heads=1, seed=8)
    key_mask = torch.ones(2, 405, dtype=torch.bool)
    key_mask[0, :120] = False
    mask = AttentionMask(causal, 105, window=250 if causal else 0, key_mask=key_mask)
    rules = [Union(0.6, 0.1, 20 + n, last_queries=last_queries).rule() for n in range(5)]
    heads = [0, 1, 2, 3, 5]
    together = lists.vertical_block_index(EstimateInputs(query, key, mask, heads, SCALE), rules)
    for place, (head, rule) in enumerate(zip(heads, rules, strict=True)):
        alone = lists.vertical_block_index(EstimateInputs(query, key, mask, [head], SCALE), [rule])
        count, index = alone.column_count[:, 0], alone.column_index[:, 0]
        assert torch.equal(together.column_count[:, place], count)
        kept = torch.arange(index.shape[-1]) < count[:, None]
        of_head = together.column_index[:, place, : index.shape[-1]]
        assert torch.equal(of_head[kept], index[kept]) and int(count.min()) > 0


@pytest.mark.parametrize("kernel", ESTIMATORS)
@settings(max_examples=25)
@given(data=st.data())
def test_any_shape_selects_what_plain_torch_selects(kernel: str, data: st.DataObject) -> None:
    generated, plain, rules = ESTIMATORS[kernel]
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16]))
    num_queries = data.draw(st.integers(1, 700))
    offset = data.draw(st.sampled_from([0, 0, 1, 64, 100, 333]))
    batch = data.draw(st.integers(1, 2))
    query, key = inputs(
        dtype,
        batch=batch,
        num_queries=num_queries,
        num_keys=num_queries + offset,
        kv_heads=data.draw(st.sampled_from([1, 2, 3, 6])),
        seed=data.draw(st.integers(0, 10**6)),
    )
    key_mask = None
    kept = data.draw(st.sampled_from([1.0, 0.9, 0.1, 0.0]))
    if kept < 1:
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 10**6)))
        key_mask = torch.rand(batch, num_queries + offset, generator=generator) < kept
    window = data.draw(st.sampled_from([0, 0, 65, 130]))
    mask = AttentionMask(query_offset=offset, window=window, key_mask=key_mask)
    scale = data.draw(st.sampled_from([SCALE, SCALE, -SCALE]))
    found = generated(EstimateInputs(query, key, mask, HEADS, scale), rules)
    expected = plain(EstimateInputs(query, key, mask, HEADS, scale), rules)
    # A score may lie within a rounding of a threshold; over so many lists some do.
    assert share_of_equal_lists(found, expected) >= 0.85
    assert_nearly_the_same(found, expected)


@pytest.mark.parametrize("kernel", ESTIMATORS)
@pytest.mark.parametrize("where", ["queries", "keys"])
def test_nan_leaves_lists_that_can_be_read(kernel: str, where: str) -> None:
    generated, _, rules = ESTIMATORS[kernel]
    query, key = inputs(torch.float32, batch=1, num_queries=640, num_keys=640, kv_heads=2, seed=4)
    (query if where == "queries" else key)[:, :, 300::7] = torch.nan
    index = generated(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), rules)
    lists = [(index.column_count, index.column_index, 640)]
    if index.block_count.numel():
        lists.append((index.block_count.clamp(max=10), index.block_index, 10))
    for count, entries, stop in lists:
        kept = torch.arange(entries.shape[-1]) < count[..., None]
        assert (entries[kept] >= 0).all() and (entries[kept] < stop).all()
        assert (entries.diff(dim=-1)[kept[..., 1:]] > 0).all(), "not ascending"


@pytest.mark.parametrize("kernel", ESTIMATORS)
def test_a_scale_of_zero_makes_all_keys_equal(kernel: str) -> None:
    generated, plain, rules = ESTIMATORS[kernel]
    query, key = inputs(torch.float32, batch=1, num_queries=640, num_keys=640, kv_heads=2, seed=3)
    found = generated(EstimateInputs(query, key, AttentionMask(), HEADS[:2], 0.0), rules[:2])
    expected = plain(EstimateInputs(query * 0, key, AttentionMask(), HEADS[:2], 1.0), rules[:2])
    assert torch.equal(found.block_count[:, :, :2], expected.block_count[:, :, :2])
    assert (found.block_count > 0).all()
    assert_nearly_the_same(found, expected)


@pytest.mark.parametrize("kernel", ESTIMATORS)
def test_lists_do_not_depend_on_the_number_of_threads(kernel: str) -> None:
    generated, _, rules = ESTIMATORS[kernel]
    query, key = inputs(
        torch.bfloat16, batch=2, num_queries=1500, num_keys=1500, kv_heads=3, seed=2
    )
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(
                generated(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), rules)
            )
    finally:
        torch.set_num_threads(before)
    assert_same_index(*found)


@pytest.mark.parametrize("kernel", ESTIMATORS)
def test_amx_source_selects_the_same_with_emulated_tiles(
    kernel: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Any
) -> None:
    generated, plain, rules = ESTIMATORS[kernel]
    header = tmp_path / "tiles.h"
    header.write_text(EMULATED_TILES)
    monkeypatch.setattr(library, "EXTRA_FLAGS", (*library.EXTRA_FLAGS, "-include", str(header)))
    monkeypatch.setattr(lists, "load_library", library.load_library.__wrapped__)
    query, key = inputs(torch.bfloat16, batch=1, num_queries=203, num_keys=250, kv_heads=2, seed=4)
    mask = AttentionMask(query_offset=47)
    spec = KernelSpec("bfloat16", DIM, DIM, "amx")
    with estimating_with(spec):
        found = generated(EstimateInputs(query, key, mask, HEADS, SCALE), rules)
    expected = plain(EstimateInputs(query, key, mask, HEADS, SCALE), rules)
    assert share_of_equal_lists(found, expected) >= 0.9


def test_what_all_keys_share_does_not_cost_union_its_precision() -> None:
    """Keys of real models have it: 255 levels of their greatest number would hold little else."""
    query, key = inputs(torch.float32, batch=1, num_queries=901, num_keys=901, kv_heads=2, seed=5)
    shared = torch.zeros(DIM)
    shared[3], shared[17] = 300.0, -120.0
    _, plain, rules = ESTIMATORS["union"]
    index = lists.vertical_block_index(
        EstimateInputs(query, key + shared, AttentionMask(), HEADS, SCALE), rules
    )
    expected = plain(EstimateInputs(query, key, AttentionMask(), HEADS, SCALE), rules)
    same = (index.block_index == expected.block_index).all(-1).float().mean()
    assert same >= 0.85
