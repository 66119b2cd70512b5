"""What patterns of other packages were written against goes on working: names, and arguments."""

from __future__ import annotations

import json
import pickle
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
import sympy
import torch

import mpass
from mpass.lowering import recorder
from mpass.lowering.index import AttentionMask, IndexWidth, diagonal_slots, empty_index
from mpass.lowering.index import num_query_blocks as count_blocks
from mpass.lowering.inputs import EstimateInputs
from mpass.patterns.base import LENGTH, Pattern, causal_keys
from mpass.patterns.base.registry import _registry, register_pattern
from mpass.patterns.union import Union, VerticalBlock
from tests.helpers.truth import random_attention


@pytest.fixture(scope="module")
def old():
    """A pattern as it was written before: arguments one by one, and the older names."""

    @register_pattern
    @dataclass(frozen=True)
    class Diagonal(Pattern):
        name: ClassVar[str] = "old_diagonal"
        form: ClassVar[Literal["lists", "diagonals"]] = "diagonals"
        budgeted: ClassVar[bool] = True
        static: ClassVar[bool] = True

        @classmethod
        def estimate(cls, query, key, mask, heads, patterns, *, scale):
            assert scale == 0.5
            rows = count_blocks(query.shape[2], mask.query_offset)
            index = empty_index(
                query, rows, IndexWidth(max_diagonals=1), diagonal_slots(len(heads))
            )
            index.diagonal_count.fill_(1)
            return index

        @classmethod
        def width(cls, patterns):
            return IndexWidth(max_diagonals=1)

        @classmethod
        def select(cls, query, key, mask, heads, patterns, *, scale):
            blocks = torch.arange(key.shape[2]) // 64
            cells = (blocks[:, None] == blocks).tril()
            return cells.expand(query.shape[0], len(heads), -1, -1)

        def fewest_keys(self) -> sympy.Expr:
            return causal_keys(32)

        def cost(self) -> sympy.Expr:
            return LENGTH

    yield Diagonal
    del _registry["old_diagonal"]


def test_a_pattern_of_the_older_signature_computes_what_it_selects(old):
    query, key, value = random_attention(num_queries=200)
    named = {"pattern": "old_diagonal", "scale": 0.5}
    cells = mpass.computed_mask(query, key, **named)
    assert torch.equal(cells, old().dense_mask(query, key, scale=0.5))
    out = mpass.sparse_attention(query, key, value, enable_gqa=True, **named)
    assert out.shape == (1, 4, 200, 32)


def test_estimate_can_be_called_in_both_ways(old):
    query, key, _ = random_attention(num_queries=200)
    mask, heads = AttentionMask(), [1, 3]
    for pattern in (old(), mpass.AShape(20, 70), mpass.VerticalSlash(40, 120)):
        cls, own = type(pattern), [pattern] * 2
        new = cls.estimate(EstimateInputs(query, key, mask, heads, 0.5), own)
        for before in (
            cls.estimate(query, key, mask, heads, own, scale=0.5),
            cls.estimate(query, key, mask=mask, heads=heads, patterns=own, scale=0.5),
            cls.estimate(inputs=EstimateInputs(query, key, mask, heads, 0.5), patterns=own),
        ):
            assert all(map(torch.equal, before.tensors(), new.tensors()))


def test_older_names_of_a_pattern_are_read_and_written(old):
    assert old.fixed_budget and old.input_independent
    assert old().min_keys() == old().fewest_keys() == causal_keys(32)
    assert old().min_density(64) == old().least_share(64)
    assert mpass.AShape.budgeted and mpass.AShape.static and not mpass.VerticalSlash.budgeted
    assert mpass.Dense().fewest_keys() == LENGTH / 2


def test_an_older_subclass_may_ask_its_base():
    class More(mpass.AShape):
        @classmethod
        def estimate(cls, query, key, mask, heads, patterns, *, scale):
            return super().estimate(query, key, mask, heads, patterns, scale=scale)

        def fewest_keys(self):
            return super().fewest_keys() + 1

    query, key, _ = random_attention(num_queries=200)
    inputs = EstimateInputs(query, key, AttentionMask(), [0], 0.5)
    found = More.estimate(inputs, [More(20, 70)])
    expected = mpass.AShape.estimate(inputs, [mpass.AShape(20, 70)])
    assert all(map(torch.equal, found.tensors(), expected.tensors()))
    assert More().min_keys() == mpass.AShape().min_keys() + 1


def test_vertical_block_is_still_named_union():
    assert mpass.Union is mpass.VerticalBlock is Union is VerticalBlock
    assert VerticalBlock.name == "union" and str(VerticalBlock()).startswith("union(")
    assert pickle.loads(pickle.dumps(mpass.Union(0.5))) == mpass.VerticalBlock(0.5)
    config = mpass.SparseConfig(mpass.Union(0.5))
    assert "union" in json.dumps(json.loads(config.to_json()))
    assert mpass.SparseConfig.from_json(config.to_json()) == config


def test_older_names_of_records_can_be_imported():
    assert recorder.Call is recorder.AttentionCall
    assert recorder.Operands is recorder.CallInputs
