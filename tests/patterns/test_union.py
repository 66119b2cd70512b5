"""Union: its rule written out once more by loops, and what its limits do."""

from __future__ import annotations

import math

import pytest
import torch

import mpass
from mpass.errors import PatternValueError
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.patterns.union import Union
from tests.helpers.truth import random_attention

LENGTH, DIM, SCALE = 448, 16, 0.25


def block_scores(query, key, block, *, rows, pool):
    """Attention per key block from the sampled rows of a query block, and sharp blocks."""
    scores, sharp = torch.zeros(LENGTH // 64), set()
    step = 64 // rows
    for row in range(block * 64 + step - 1, block * 64 + 64, step):
        runs = [start for start in range(0, LENGTH, pool) if start <= row]
        logits = [query[row] @ key[start : start + pool].mean(0) * SCALE for start in runs]
        of_row = torch.zeros(LENGTH // 64)
        for start, weight in zip(runs, torch.stack(logits).softmax(0), strict=True):
            of_row[start // 64] += weight
        scores += of_row
        sharp |= set((of_row >= 0.25).nonzero()[:, 0].tolist())
    return scores, sharp


def kept_blocks(scores, block, *, mass, sink_blocks, local_blocks, sharp):
    """Forced blocks first, then the best others until `mass` of the score is held."""
    kept = {j for j in range(block + 1) if j < sink_blocks or block - j < local_blocks}
    kept |= sharp
    others = sorted(set(range(block + 1)) - kept, key=lambda j: -float(scores[j]))
    held = sum(float(scores[j]) for j in kept)
    for j in others:
        if held >= mass * float(scores.sum()):
            break
        kept.add(j)
        held += float(scores[j])
    return kept


@pytest.mark.parametrize(
    ("rows", "pool", "last_queries"), [(64, 64, 64), (16, 16, 16), (32, 8, 32)]
)
def test_union_keeps_mass_and_columns_by_its_rule(rows, pool, last_queries):
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    query = query * 3  # sharper than random
    pattern = Union(0.5, 0.25, 20, 1, 2, rows=rows, pool=pool, last_queries=last_queries)
    cells = pattern.dense_mask(query, key, scale=SCALE)[0, 0]

    vertical = torch.zeros(LENGTH)
    for row in range(LENGTH - last_queries, LENGTH):
        vertical[: row + 1] += torch.softmax(query[0, 0, row] @ key[0, 0, : row + 1].T * SCALE, -1)
    columns = set(vertical.topk(20).indices.tolist())
    sizes = []
    for block in range(LENGTH // 64):
        scores, sharp = block_scores(query[0, 0], key[0, 0], block, rows=rows, pool=pool)
        blocks = kept_blocks(scores, block, mass=0.5, sink_blocks=1, local_blocks=2, sharp=sharp)
        sizes.append(len(blocks))
        for row in (block * 64, block * 64 + 63):
            expected = {j for j in range(row + 1) if j // 64 in blocks or j in columns}
            assert set(cells[row].nonzero()[:, 0].tolist()) == expected
    assert 3 < max(sizes) < LENGTH // 64, "the rule had nothing to choose"


def test_union_that_sees_both_ways_keeps_blocks_and_columns_on_both_sides():
    """Written out by loops: every row sees all keys, and 16 rows of all choose the columns."""
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    query = query * 3
    pattern = Union(0.5, 0.3, 20, 1, 1, rows=32, pool=16)
    mask = AttentionMask(causal=False)
    cells = pattern.dense_mask(query, key, mask=mask, scale=SCALE)[0, 0]

    logits = query[0, 0] @ key[0, 0].T * SCALE
    spread = [(n + 1) * LENGTH // 16 - 1 for n in range(16)]
    columns = set(logits[spread].softmax(-1).sum(0).topk(20).indices.tolist())
    means = key[0, 0].view(-1, 16, DIM).mean(1)
    of_runs = (query[0, 0] @ means.T * SCALE).softmax(-1)
    of_blocks = of_runs.view(LENGTH // 64, 64, LENGTH // 64, 4).sum(-1)[:, 1::2]  # every other row
    ahead = 0
    for block, shares in enumerate(of_blocks):
        kept = {0, block} | set((shares.amax(0) >= 0.3).nonzero()[:, 0].tolist())
        scores = shares.sum(0)
        for j in scores.argsort(descending=True).tolist():
            if sum(float(scores[k]) for k in kept) >= 0.5 * float(scores.sum()):
                break
            kept.add(j)
        ahead += sum(j > block for j in kept)
        expected = {j for j in range(LENGTH) if j // 64 in kept or j in columns}
        for row in (block * 64, block * 64 + 63):
            assert set(cells[row].nonzero()[:, 0].tolist()) == expected
    assert ahead > 3, "the rule had nothing to choose ahead"


def test_whole_mass_computes_every_causal_key():
    query, key, _ = random_attention(num_queries=300)
    assert (mpass.density(query, key, pattern=Union(1.0, columns=0)) == 1).all()


def test_last_blocks_are_dense_and_counted_from_the_last_real_query():
    query, key, _ = random_attention(num_queries=640)
    key_mask = torch.ones(1, 640, dtype=torch.bool)
    key_mask[:, -100:] = False  # the last real query stands in block 8
    cells = mpass.computed_mask(
        query, key, pattern=Union(0.1, 1.0, 0, last_blocks=2), key_mask=key_mask
    )
    per_row = cells[0, 0].sum(-1)
    assert torch.equal(per_row[448:540], torch.arange(449, 541))
    assert (per_row[400:448] < 300).all()


def test_limit_keeps_forced_blocks_and_then_the_best():
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    cells = Union(1.0, 1.0, 0, 1, 1, max_blocks=3).dense_mask(query, key, scale=SCALE)[0, 0]
    for block in range(4, 7):
        scores, _ = block_scores(query[0, 0], key[0, 0], block, rows=16, pool=8)
        best = max(range(1, block), key=lambda j: float(scores[j]))
        row = cells[block * 64 + 63].view(-1, 64).any(-1)
        assert set(row.nonzero()[:, 0].tolist()) == {0, best, block}


def test_memory_of_the_index_grows_linearly():
    sizes = []
    for length in (4096, 8192):
        query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=length, head_dim=16)
        index = Union.estimate(EstimateInputs(query, key, AttentionMask(), [0], SCALE), [Union()])
        sizes.append(index.num_bytes())
    assert sizes[1] < 2 * sizes[0]


def test_finer_runs_find_a_single_key_that_a_block_mean_hides():
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=1024, head_dim=16)
    key[:, :, 300] = 0
    key[:, :, 300, 0] = 30.0  # one hot key in block 4, diluted 64 times by its block's mean
    query[..., 0] = 1.0
    weights = []
    for pool in (64, 4):
        pattern = Union(0.6, 1.0, 0, pool=pool, rows=16)
        cells = pattern.dense_mask(query, key, scale=SCALE)[0, 0]
        weights.append(float(cells[512:, 300].float().mean()))
    assert weights[0] < 0.9 < weights[1] == 1.0


def test_share_at_a_length_is_another_one_at_other_lengths():
    pattern = Union(row_share=0.01, at_length=8192)
    assert pattern.at(8192).row_share == 0.01
    assert pattern.at(2048).row_share == pytest.approx(0.04)
    assert pattern.at(32768).row_share == pytest.approx(0.005)
    assert pattern.at(16).row_share == 1.0
    assert Union().at(100) == Union()


@pytest.mark.parametrize("window", [0, 192])
@pytest.mark.parametrize("per", ["head", "kv_head"])
def test_share_at_a_length_selects_what_the_share_of_this_prompt_does(window, per):
    query, key, _ = random_attention(num_queries=LENGTH, head_dim=DIM)
    query = query * 3
    mask = AttentionMask(window=window)
    keys = window or LENGTH
    scaled = Union(0.1, 0.3, 0, per=per, at_length=2 * keys)
    plain, other = Union(0.1, 0.6, 0, per=per), Union(0.1, 0.3, 0, per=per)
    cells = [p.dense_mask(query, key, mask=mask) for p in (scaled, plain, other)]
    assert torch.equal(cells[0], cells[1])
    assert not torch.equal(cells[0], cells[2])
    heads = range(query.shape[1])
    inputs = EstimateInputs(query, key, mask, heads, SCALE)
    indexes = [Union.estimate(inputs, [p] * len(heads)) for p in (scaled, plain)]
    for mine, its in zip(*(index.tensors() for index in indexes), strict=True):
        assert torch.equal(mine, its)


def test_share_at_a_length_is_as_dense_as_the_share_of_that_length():
    assert Union(row_share=0.009, at_length=8192).usual_density(4096) == Union().usual_density(4096)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mass": 0.0}, "mass is 0.0"),
        ({"mass": 1.5}, "mass is 1.5"),
        ({"mass": math.nan}, "mass is nan"),
        ({"row_share": 0.0}, "row_share is 0.0"),
        ({"columns": -1}, "columns is -1"),
        ({"rows": 48}, "a divisor of 64"),
        ({"pool": 128}, "a divisor of 64"),
        ({"last_queries": 8}, "last_queries is 8; allowed: 16, 32, 64"),
        ({"max_blocks": 2}, "max_blocks is 2; allowed: 3 or more"),
        ({"at_length": -1}, "at_length is -1"),
    ],
)
def test_bad_parameter_is_named(values, words):
    with pytest.raises(PatternValueError, match=words):
        Union(**values)
