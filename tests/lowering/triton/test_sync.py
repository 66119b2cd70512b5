"""What a CUDA graph forbids does not happen: reading the device, copying host data, changing sizes.

Seen without a GPU in the torch ops around the launches; the launches themselves only enqueue.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mpass.lowering.estimators import ESTIMATORS
from mpass.lowering.index import AttentionMask, IndexWidth, empty_index, list_slots
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.reference.block_scores import BlockScoresRule
from mpass.lowering.reference.block_sparse import BlockSparseRule
from mpass.lowering.reference.flex_prefill import FlexPrefillRule
from mpass.lowering.reference.sample_attention import SampleAttentionRule
from mpass.lowering.reference.union import VerticalBlockRule
from mpass.lowering.reference.vertical_slash import VerticalSlashRule
from mpass.lowering.reference.x_attention import XAttentionRule
from mpass.lowering.triton import (
    LOWERING,
    attention,
    block_scores,
    launch,
    list_blocks,
    pooled_keys,
    sample_attention,
    union,
    vertical_slash,
    x_attention,
)
from mpass.patterns.base import find_pattern
from mpass.patterns.base.kv_groups import Turns, merge_heads, spread_columns
from tests.helpers.triton_cases import SLOTS, padding, random_index
from tests.helpers.truth import random_attention

READS_THE_DEVICE = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero"}
COPIES_FROM_THE_HOST = {"lift_fresh", "lift_fresh_copy"}


BLOCK_SCORES = BlockScoresRule(0.5, None, 128, 1, 1, 1, 9)
RULES = {
    "block_scores": [BLOCK_SCORES, dataclasses.replace(BLOCK_SCORES, share=None, mass=0.5)],
    "block_sparse": [BlockSparseRule(50, 64)],
    "flex_prefill": [FlexPrefillRule(0.9, 0.1, 64, 1024, 128, 9)],
    "sample_attention": [SampleAttentionRule(0.9, 0.1, 0.1, 100, 50)],
    "vertical_block": [VerticalBlockRule(0.5, 0.5, 20, 1, 1, 1, 16, 8, 9, 64)],
    "vertical_slash": [VerticalSlashRule(50, 50)],
    "x_attention": [XAttentionRule(0.5, 8, 128, 1, 1, 1, 9)],
}
SCORED = (block_scores, sample_attention, union, vertical_slash, x_attention)
"""Modules of estimators with kernels of their own beside those that list blocks."""


class OpNames(TorchDispatchMode):
    """Collects the names of all torch ops that run inside, and counts them."""

    def __init__(self):
        super().__init__()
        self.names = set()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.__name__.split(".")[0])
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch):
    """Names and grids of the kernels that are launched, instead of running them."""
    seen = []

    def enqueue(spec, kernel, grid, **arguments):
        seen.append((kernel, grid))
        if kernel == "write_ints":
            arguments["out"].zero_()  # torch indexes with these

    for module in (*SCORED, launch, attention, list_blocks, pooled_keys):
        monkeypatch.setattr(module, "launch", enqueue)
    return seen


MASKS = {
    "plain": AttentionMask(),
    "all": AttentionMask(True, 40, 90, padding(2, 300)),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_attention_is_three_launches_and_no_host_sync(mask, launches):
    num_queries = 300 - mask.query_offset
    query, key, value = random_attention(2, num_queries=num_queries, num_keys=300)
    index = random_index(
        SLOTS["mixed"],
        mask,
        batch=2,
        num_queries=num_queries,
        num_keys=300,
        width=IndexWidth(3, 3, 70),
    )
    with OpNames() as ops:
        attention.sparse_attention(
            AttentionInputs(query, key, value, mask, 0.2, softcap=2.0, sink_logits=torch.ones(4)),
            index,
        )
    assert not ops.names & (READS_THE_DEVICE | COPIES_FROM_THE_HOST)
    # The mixed form reads each head's slot, which one more launch writes.
    names = [kernel for kernel, _ in launches]
    assert names == ["write_ints", "plan_rows", "gather_columns", "sparse_attention"]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
def test_estimation_has_no_host_sync_and_no_launch_per_head(mask, launches):
    query, key, _ = random_attention(2, num_queries=300 - mask.query_offset, num_keys=300)
    counts = []
    for heads in ([0], [0, 1, 2, 3]):
        launches.clear()
        given = EstimateInputs(query, key, mask, heads, 0.2)
        with OpNames() as ops:
            for estimator in ESTIMATORS:
                for rule in RULES[estimator.name]:
                    LOWERING.estimate(estimator)(given, [rule] * len(heads))
        assert not ops.names & (READS_THE_DEVICE | COPIES_FROM_THE_HOST)
        counts.append(sum(kernel != "write_ints" for kernel, _ in launches))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("name", ["a_shape", "strided", "tri_shape", "dense"])
def test_static_patterns_have_no_host_sync_and_no_op_per_head(name, mask):
    cls = find_pattern(name)
    query, key, _ = random_attention(2, num_queries=300 - mask.query_offset, num_keys=300)
    counts = []
    for heads in ([0, 1], [0, 1, 2, 3]):
        with OpNames() as ops:
            cls.estimate(EstimateInputs(query, key, mask, heads, 0.2), [cls()] * len(heads))
        assert not ops.names & (READS_THE_DEVICE | COPIES_FROM_THE_HOST)
        counts.append(ops.count)
    assert counts[0] == counts[1]


@pytest.mark.parametrize("first", [0, 1], ids=["whole groups", "a part of one"])
def test_heads_that_select_together_are_merged_without_host_sync(first):
    query, key, _ = random_attention(2, heads=8, kv_heads=2, num_queries=250, num_keys=300)
    heads = range(first, 8)
    rows = tuple(head // 4 for head in heads)
    inputs = EstimateInputs(query, key, AttentionMask(True, 50), heads, 0.2)
    index = empty_index(query, 5, IndexWidth(3, 0, 5), list_slots(2))
    with OpNames() as ops:
        merge_heads(inputs, rows, [Turns(4, 4)] * 2)
        spread_columns(index, rows)
    assert not ops.names & (READS_THE_DEVICE | COPIES_FROM_THE_HOST)
