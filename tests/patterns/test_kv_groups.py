"""One selection for the query heads of a kv head: what it reads, shares and costs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

import mpass
from mpass.config.pattern_text import parse_pattern
from mpass.errors import PatternValueError
from mpass.lowering import cpu, triton
from mpass.lowering.density import causal_work_share, density, work_share
from mpass.lowering.device import REFERENCE
from mpass.lowering.index import AttentionMask, join_indexes, join_slots, num_query_blocks
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.recorder import record
from mpass.lowering.reference.attention import computed_mask
from mpass.patterns.base import find_pattern, index_op, patterns_as_text, registered_patterns
from mpass.patterns.base.kv_groups import Turns, index_rows, merge_heads
from mpass.patterns.base.masked_attention import patterns_from_text
from tests.helpers.toys import compile_toy
from tests.helpers.truth import TOLERANCE, dense_attention, random_attention

NAMES = ["block_max", "block_sparse", "block_top_p", "flex_prefill", "union", "x_attention"]
LOWERINGS = {"reference": REFERENCE, "cpu": cpu.LOWERING, "triton": triton.LOWERING}


def per_kv_head(name, example=0):
    return replace(find_pattern(name).examples()[example], per="kv_head")


def every_pattern_with_the_option():
    kinds = registered_patterns().items()
    return sorted(name for name, cls in kinds if "per" in cls().parameters())


def test_all_patterns_that_list_scored_blocks_have_the_option():
    assert every_pattern_with_the_option() == NAMES
    assert all(find_pattern(name)().per == "head" for name in NAMES)


def attentions(**sizes):
    return random_attention(**{"heads": 6, "kv_heads": 2, "num_queries": 330} | sizes)


@pytest.mark.parametrize("offset", [0, 70])
@pytest.mark.parametrize("turns", [Turns(), Turns(8), Turns(4, 4), Turns(2, 8)], ids=str)
@pytest.mark.parametrize(
    ("heads", "rows"),
    [
        ([0, 1, 2, 3, 4, 5], (0, 0, 0, 1, 1, 1)),
        ([0, 2, 3, 4, 5], (0, 0, 1, 1, 1)),
        ([0, 1, 2, 4], (0, 1, 0, 2)),
        ([5, 1, 4], (0, 1, 0)),
    ],
    ids=str,
)
def test_query_rows_are_taken_in_turn_from_the_heads_of_a_row(heads, rows, turns, offset):
    query, key, _ = attentions(num_keys=330 + offset)
    inputs = EstimateInputs(query, key, AttentionMask(True, offset), heads, 0.2)
    merged = merge_heads(inputs, rows, [turns] * (max(rows) + 1))
    assert merged.query.shape[1] % 2 == 0
    positions = torch.arange(330) + offset
    for row, place in enumerate(merged.heads):
        members = torch.tensor([h for h, own in zip(heads, rows, strict=True) if own == row])
        turn = positions // turns.length + turns.skew * (positions % turns.length)
        expected = query[:, members[turn % len(members)], torch.arange(330)]
        assert torch.equal(merged.query[:, place], expected)
        assert place // merged.group == members[0] // inputs.group


def test_fewer_queries_than_a_round_are_taken_in_turn():
    query, key, _ = attentions(num_queries=3, num_keys=10)
    inputs = EstimateInputs(query, key, AttentionMask(True, 7), range(6), 0.2)
    merged = merge_heads(inputs, (0, 0, 0, 1, 1, 1), [Turns(2)] * 2)
    taken = torch.stack([query[:, [0, 3], 0], query[:, [1, 4], 1], query[:, [1, 4], 2]], 2)
    assert torch.equal(merged.query, taken)


def test_union_looks_at_as_many_rows_of_each_head():
    """Of the rows of a block that are looked at, and of the last ones, which choose columns."""
    for rows in (8, 16, 32, 64):
        turns = mpass.Union(rows=rows).turns()
        step = 64 // rows
        for positions in (range(64 + step - 1, 128, step), range(112, 128)):
            heads = [(p // turns.length + turns.skew * (p % turns.length)) % 4 for p in positions]
            counts = [heads.count(head) for head in range(4)]
            assert counts == [len(positions) // 4] * 4


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("name", NAMES)
def test_every_lowering_shares_blocks_and_columns_in_a_group(name, lowering, padded, monkeypatch):
    """They equal what plain torch estimates, cell by cell, and attention over them is exact."""
    pattern, offset, length = per_kv_head(name), 70, 80 if lowering == "triton" else 200
    batch, num_keys = 1 + padded, length + offset
    query, key, value = attentions(num_queries=length, num_keys=num_keys, batch=batch)
    key_mask = torch.ones(batch, num_keys, dtype=torch.bool)
    key_mask[-1, -30:] = False
    mask = AttentionMask(True, offset, 0, key_mask if padded else None)
    inputs = EstimateInputs(query, key, mask, range(6), 32**-0.5)
    own = LOWERINGS[lowering]
    monkeypatch.setattr("mpass.patterns.base.scored.choose_lowering", lambda inputs: own)
    index = type(pattern).estimate(inputs, [pattern] * 6)
    assert index.head_slots == (0, 0, 0, 1, 1, 1)
    assert index.block_count.shape[:2] == (batch, 2)
    assert index.column_index.shape[:2] == (batch, 6)
    cells = computed_mask(index, mask, batch=batch, num_queries=length, num_keys=num_keys)
    groups = cells.unflatten(1, (2, 3))
    assert torch.equal(groups, groups[:, :, :1].expand_as(groups))
    selected = type(pattern).select(inputs, [pattern] * 6)
    assert (cells != selected).float().mean() < 0.002
    if lowering == "triton" and name != "union":
        return  # one kernel attends over all of them, and it is slow to interpret
    attend = AttentionInputs(query, key, value, mask, 32**-0.5)
    truth = dense_attention(query, key, value, cells, 32**-0.5)
    seen = cells.any(-1)[..., None]
    error = (own.sparse_attention(attend, index) - truth).masked_fill(~seen, 0.0)
    assert error.abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_a_head_of_its_own_kv_head_selects_as_alone(name):
    query, key, _ = attentions(kv_heads=6)
    alone = find_pattern(name).examples()[0]
    shared = replace(alone, per="kv_head")
    cells = mpass.computed_mask(query, key, pattern=shared)
    assert torch.equal(cells, mpass.computed_mask(query, key, pattern=alone))


@pytest.mark.parametrize("name", NAMES)
def test_equal_heads_select_together_what_each_selects(name):
    """Where the query heads of a kv head are the same head, taking turns changes nothing."""
    query, key, _ = attentions()
    query = query[:, ::3].repeat_interleave(3, 1)
    alone = find_pattern(name).examples()[0]
    cells = mpass.computed_mask(query, key, pattern=replace(alone, per="kv_head"))
    assert torch.equal(cells, mpass.computed_mask(query, key, pattern=alone))


def test_an_estimator_is_asked_for_one_head_per_row(monkeypatch):
    asked = []
    pattern = per_kv_head("block_max")
    estimator = type(pattern).estimator

    class Spy:
        def estimate(self, found):
            def run(inputs, rules):
                asked.append((inputs.query.shape[1], list(inputs.heads), len(rules)))
                return found.reference(inputs, rules)

            assert found is estimator
            return run

    monkeypatch.setattr("mpass.patterns.base.scored.choose_lowering", lambda inputs: Spy())
    query, key, _ = attentions(heads=8)
    inputs = EstimateInputs(query, key, AttentionMask(), range(8), 0.2)
    type(pattern).estimate(inputs, [pattern] * 8)
    other = replace(pattern, share=0.5)
    alone = replace(pattern, per="head")
    type(pattern).estimate(inputs, [pattern, pattern, other, alone] * 2)
    assert asked == [(2, [0, 1], 2), (6, [0, 1, 2, 3, 4, 5], 6)]


def test_heads_share_a_row_only_with_the_same_pattern_of_the_same_kv_head():
    shared, other, alone = per_kv_head("union"), per_kv_head("union", 1), mpass.Union()
    rows = index_rows([shared, alone, shared, alone, shared, other, shared, other], range(8), 4)
    assert rows == (0, 1, 0, 2, 3, 4, 3, 4)
    assert index_rows([shared] * 3, [5, 2, 4], 3) == (0, 1, 0)


def test_parts_with_shared_rows_are_joined():
    query, key, value = attentions(heads=8, kv_heads=2)
    lists, blocks, diagonals = per_kv_head("union"), per_kv_head("block_max"), mpass.AShape(20, 70)
    heads = [[0, 1, 4, 7], [2, 5, 6], [3]]
    patterns = [[lists] * 4, [blocks] * 3, [diagonals]]
    mask = AttentionMask()
    parts = [
        type(own[0]).estimate(EstimateInputs(query, key, mask, some, 0.2), own)
        for own, some in zip(patterns, heads, strict=True)
    ]
    index = join_indexes(parts, heads)
    assert index.head_slots == (0, 0, 2, -1, 1, 3, 3, 1)
    assert index.head_slots == join_slots([part.head_slots for part in parts], heads)
    sizes = {"batch": 1, "num_queries": 330, "num_keys": 330}
    cells = computed_mask(index, mask, **sizes)
    for part, some in zip(parts, heads, strict=True):
        assert torch.equal(cells[:, some], computed_mask(part, mask, **sizes))
    inputs = AttentionInputs(query, key, value, mask, 0.2)
    truth = dense_attention(query, key, value, cells, 0.2)
    for lowering in (REFERENCE, cpu.LOWERING):
        out = lowering.sparse_attention(inputs, index)
        assert (out - truth).abs().max() < TOLERANCE[torch.float32]


def test_work_is_counted_once_per_head_that_reads_a_row():
    query, key, _ = attentions(num_queries=1000)
    pattern, mask = replace(per_kv_head("block_sparse"), top_k=4), AttentionMask()
    inputs = EstimateInputs(query, key, mask, range(6), 0.2)
    index = type(pattern).estimate(inputs, [pattern] * 6)
    share = density(index, mask, batch=1, num_queries=1000, num_keys=1000)
    cells = computed_mask(index, mask, batch=1, num_queries=1000, num_keys=1000)
    assert torch.allclose(share, cells.sum((2, 3)).double() / (1000 * 1001 / 2))
    tiles = work_share(index, mask, 1000, 1000)
    assert abs(tiles - float(share.mean())) < 0.1
    assert float(causal_work_share(index, 1000)) == pytest.approx(tiles, rel=1e-5)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_fake_index_of_an_op_has_the_sizes_of_the_real_one(name, dense):
    query, key, _ = attentions()
    shared, alone = per_kv_head(name), find_pattern(name).examples()[1]
    patterns = [shared, shared, alone, shared, alone, shared]
    values = [[p.parameters()[field] for p in patterns] for field in shared.parameters()]
    settings = (None, list(range(6)), 0, 0, True, 0.2, 1.0, 10**6 if dense else 0)
    real = index_op(type(shared))(query, key, *settings, *values)
    fake = index_op(type(shared))(query.to("meta"), key.to("meta"), *settings, *values)
    assert [tensor.shape for tensor in fake] == [tensor.shape for tensor in real]
    assert real[0].shape == (1, 4, num_query_blocks(330, 0))


@pytest.mark.parametrize("read", [False, True], ids=["proven mask", "mask read at run time"])
def test_compiled_attention_reads_shared_rows(read):
    """Some heads of a kv head select together, others alone or by another pattern."""
    query, key, value = attentions(heads=8, num_queries=256)
    shared = mpass.BlockSparse(2, per="kv_head")
    alone = [shared, mpass.BlockSparse(2), shared, mpass.AShape(20, 70)]

    @mpass.configure(pattern=[*alone, *[shared] * 4])
    def program(query, key, value, mask):
        causal = {"attn_mask": mask} if read else {"is_causal": True}
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True, **causal)

    compiled = compile_toy(program, {"dense_above": 2.0})
    seen = []
    with record(inspect=lambda call, inputs: seen.append(inputs)):
        out = compiled(query, key, value, torch.ones(256, 256).tril().bool())
    (inputs,) = seen
    index = inputs.index
    assert index.block_count.shape[1] == 3 and index.diagonal_count.shape[1] == 1
    assert index.head_slots == (0, 1, 0, -1, 2, 2, 2, 2)
    cells = computed_mask(index, inputs.mask, batch=1, num_queries=256, num_keys=256)
    truth = dense_attention(query, key, value, cells, 32**-0.5)
    assert (out - truth).abs().max() < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", NAMES)
def test_option_survives_text_and_json(name):
    pattern = per_kv_head(name)
    assert str(pattern).endswith(", per='kv_head')") and "head" not in str(type(pattern)())
    assert parse_pattern(str(pattern)) == pattern
    assert parse_pattern(f'{name}(per="kv_head")') == replace(type(pattern)(), per="kv_head")
    config = mpass.SparseConfig(pattern, {1: [pattern, type(pattern)()]})
    assert mpass.SparseConfig.from_json(config.to_json()) == config
    assert patterns_from_text(patterns_as_text([pattern, pattern])) == (pattern, pattern)


@pytest.mark.parametrize("value", ["group", 1, True, None])
@pytest.mark.parametrize("name", NAMES)
def test_another_value_of_the_option_is_refused(name, value):
    with pytest.raises(PatternValueError, match=r"per is .*; allowed: 'head' or 'kv_head'"):
        replace(find_pattern(name)(), per=value)
