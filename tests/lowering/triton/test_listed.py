"""Blocks listed otherwise than a mask says, corrected on the device: against plain torch."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering import block_mask
from mpass.lowering.block_mask import BlockLists, attend_as_listed, lists_agree
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.listed import correct_as_listed
from tests.helpers.triton_cases import padding
from tests.helpers.truth import random_attention

N = 70
MASKS = {
    "causal": AttentionMask(),
    "all": AttentionMask(True, 20, 33, padding(2, N)),
    "bidirectional": AttentionMask(causal=False),
}


def random_lists(batch: int, heads: int, num_queries: int, seed: int) -> BlockLists:
    """Lists of blocks of 16 queries and 32 keys, some of them listed twice or not at all."""
    generator = torch.Generator().manual_seed(seed)
    rows, columns = -(-num_queries // 16), -(-N // 32)

    def table(high: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, high, (batch, heads, rows, *shape), generator=generator).int()

    some, many = table(columns + 1), table(columns, columns)
    return BlockLists(some, many, table(2), table(columns, columns), 16, 32)


def right_lists(mask: AttentionMask, num_queries: int) -> BlockLists:
    """Lists of every block as partial, which say what any mask says."""
    rows, columns = -(-num_queries // 16), -(-N // 32)
    counts = torch.full((1, 1, rows), columns, dtype=torch.int32)
    entries = torch.arange(columns, dtype=torch.int32).expand(1, 1, rows, -1)
    lists = BlockLists(counts, entries, None, None, 16, 32)
    assert lists_agree(lists, mask, num_queries, N)
    return lists


def inputs_of(mask: AttentionMask, softcap: float) -> AttentionInputs:
    query, key, value = random_attention(2, 4, 2, N - mask.query_offset, N, 24, 40)
    return AttentionInputs(query, key, value, mask, 0.25, softcap)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("correct", [correct_as_listed, block_mask.correct_as_listed])
def test_lists_of_their_own_are_computed_as_listed(correct, mask, softcap):
    inputs = inputs_of(mask, softcap)
    num_queries = inputs.query.shape[2]
    for seed, (batch, heads) in enumerate([(1, 1), (2, 4)]):
        lists = random_lists(batch, heads, num_queries, seed)
        assert not lists_agree(lists, mask, num_queries, N)
        out = torch.full((2, num_queries, 4, 40), 7.0).transpose(1, 2)
        expected = torch.empty(2, 4, num_queries, 40)
        correct(out, inputs, lists)
        attend_as_listed(expected, inputs, lists)
        torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
@pytest.mark.parametrize("correct", [correct_as_listed, block_mask.correct_as_listed])
def test_lists_that_are_those_of_the_mask_change_nothing(correct, mask):
    inputs = inputs_of(mask, 0.0)
    out = torch.full((2, 4, inputs.query.shape[2], 40), 7.0)
    correct(out, inputs, right_lists(mask, inputs.query.shape[2]))
    assert (out == 7).all()
