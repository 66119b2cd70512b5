"""The selection kernel alone, interpreted, on scores made up: every rule, rows of several chunks.

Scores are powers of two, so that every sum of them is exact whatever its order, and full of ties.
"""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from mpass.lowering.index import ALL_BLOCKS, AttentionMask, IndexWidth, empty_index
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import candidates, keep_above, keep_mass
from mpass.lowering.reference.block_sparse import top_k_blocks
from mpass.lowering.triton import list_blocks
from mpass.lowering.triton.launch import device_ints
from mpass.lowering.triton.spec import SELECT_TILE
from tests.helpers.rotation import part_of_today
from tests.helpers.triton_cases import poisoned_memory

BLOCKS, ROWS, HEADS = 3 * SELECT_TILE + 60, 1, 3
"""Key blocks of a row (four chunks, the last one not full), query blocks, heads."""

MASKS = {
    "causal": AttentionMask(query_offset=(BLOCKS - ROWS) * 64),
    "early": AttentionMask(query_offset=(SELECT_TILE - 1) * 64),
    "window": AttentionMask(query_offset=(BLOCKS - 60) * 64, window=300 * 64 + 5),
    "bidirectional": AttentionMask(query_offset=40 * 64, causal=False),
}
RULES = {
    "top_k": [
        list_blocks.ListRule(0, 1),
        list_blocks.ListRule(1, 77),
        list_blocks.ListRule(2, 380),
    ],
    "share": [
        list_blocks.ListRule(0, 200, 2, 3, share=0.5),
        list_blocks.ListRule(1, 40, share=0.01),
        list_blocks.ListRule(2, 4, 3, 5, share=0.01),
    ],
    "mass": [
        list_blocks.ListRule(0, 390, 1, 2, share=0.7),
        list_blocks.ListRule(1, 60, 0, 1, share=0.95),
        list_blocks.ListRule(2, 300, 1, 1, 1, share=1.0),
    ],
}
RULES["row_mass"] = RULES["mass"]


def scores_of(rule: str, seed: int) -> Tensor:
    """Scores [1, HEADS, ROWS, BLOCKS] of a rule: few values, zeros among them."""
    generator = torch.Generator().manual_seed(seed)
    shape = (1, HEADS, ROWS, BLOCKS)
    steps = torch.randint(0, 9, shape, generator=generator).float()
    scores = torch.exp2(-steps).masked_fill(steps == 8, 0.0)
    if rule == "top_k":
        scores = torch.where(torch.rand(shape, generator=generator) < 0.5, scores, -scores)
    elif rule == "row_mass":
        wanted = (torch.rand(shape, generator=generator) < 0.02) & (scores > 0)
        scores = torch.where(wanted, -scores, scores)
    return scores


def given(mask: AttentionMask) -> EstimateInputs:
    query = torch.zeros(1, HEADS, ROWS * 64, 16)
    key = torch.zeros(1, HEADS, BLOCKS * 64, 16)
    return EstimateInputs(query, key, mask, range(HEADS), 1.0)


def kept_blocks(rule: str, head: list_blocks.ListRule, scores: Tensor, mask: AttentionMask):
    """What the reference keeps of scores [ROWS, BLOCKS] of one head: bool [ROWS, BLOCKS]."""
    inputs = given(mask)
    if rule == "top_k":
        table = top_k_blocks(scores[None], torch.eye(BLOCKS)[None], mask, 64, head.limit)
        return table[0]
    choice = candidates(
        inputs.query,
        inputs.key,
        mask,
        torch.arange(ROWS) + inputs.first_block,
        scores.abs()[None],
        sink_blocks=head.sink_blocks,
        local_blocks=head.local_blocks,
        last_blocks=head.last_blocks,
        max_blocks=head.limit,
    )
    if rule == "share":
        return keep_above(choice, head.share)[0]
    return keep_mass(choice, head.share, scores[None] < 0 if rule == "row_mass" else None)[0]


def run(rule: str, rules, scores: Tensor, mask: AttentionMask, width: int):
    """The lists of every head, [HEADS, ROWS] counts and entries, over garbage where not written."""
    inputs = given(mask)
    index = empty_index(inputs.query, ROWS, IndexWidth(max_blocks=width), range(HEADS))
    index.block_count.fill_(-12345)
    if rule in ("share", "mass"):
        scores = scores.log2().clamp(min=-1e30)
    numbers = device_ints(list_blocks.numbers_of(rules), scores.device)
    with poisoned_memory():
        list_blocks.list_blocks(
            index, scores, rule, numbers, inputs,
            rows=(0, ROWS), first_score_row=inputs.first_block, repeat=1,
        )  # fmt: skip
    return index.block_count[0], index.block_index[0]


@pytest.mark.parametrize(
    ("rule", "name"), part_of_today(list(itertools.product(RULES, MASKS)), share=2)
)
def test_rows_of_several_chunks_keep_what_the_reference_keeps(rule, name):
    mask, width = MASKS[name], 400
    scores = scores_of(rule, seed=len(name))
    counts, entries = run(rule, RULES[rule], scores, mask, width)
    for place, head in enumerate(RULES[rule]):
        table = kept_blocks(rule, head, scores[0, place], mask)
        for row in range(ROWS):
            expected = table[row].nonzero()[:, 0].tolist()
            if len(expected) > width:
                assert counts[place, row] == ALL_BLOCKS
                continue
            assert counts[place, row] == len(expected)
            assert entries[place, row, : len(expected)].tolist() == expected


@pytest.mark.slow
@pytest.mark.parametrize(("rule", "name"), itertools.product(RULES, MASKS))
def test_rows_of_every_rule_and_mask_are_the_same_in_each_run(rule, name):
    scores = scores_of(rule, seed=len(name)) * torch.rand(1, HEADS, ROWS, BLOCKS)
    if rule in ("share", "mass"):
        scores = scores.abs()
    first = run(rule, RULES[rule], scores, MASKS[name], 400)
    again = run(rule, RULES[rule], scores, MASKS[name], 400)
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])


@pytest.mark.parametrize("rule", RULES)
def test_rows_without_any_score_keep_what_is_forced(rule):
    mask = MASKS["causal"]
    counts, entries = run(rule, RULES[rule], torch.zeros(1, HEADS, ROWS, BLOCKS), mask, BLOCKS)
    for place, head in enumerate(RULES[rule]):
        table = kept_blocks(rule, head, torch.zeros(ROWS, BLOCKS), mask)
        for row in range(ROWS):
            expected = table[row].nonzero()[:, 0].tolist()
            assert counts[place, row] == len(expected)
            assert entries[place, row, : len(expected)].tolist() == expected
