"""Published rules written out once more by loops: XAttention, FlexPrefill, SampleAttention."""

from __future__ import annotations

import math

import pytest
import torch

from mpass.errors import PatternValueError
from mpass.lowering.index import AttentionMask
from mpass.lowering.reference.flex_prefill import choose
from mpass.patterns.flex_prefill import FlexPrefill
from mpass.patterns.sample_attention import SampleAttention
from mpass.patterns.x_attention import XAttention
from tests.helpers.truth import random_attention

LENGTH, DIM, SCALE = 768, 16, 0.25


def sharp_attention():
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    return query * 2, key


def kept_tiles(cells, tile, size):
    """Blocks of keys that the last row of a tile sees."""
    return set(cells[(tile + 1) * size - 1].view(-1, size).any(-1).nonzero()[:, 0].tolist())


def exact_rows(query, key, rows):
    """Softmax weights of some rows over all keys, by loops: [rows, N]."""
    weights = torch.zeros(len(rows), LENGTH)
    for i, row in enumerate(rows):
        weights[i, : row + 1] = torch.softmax(query[row] @ key[: row + 1].T * SCALE, -1)
    return weights


@pytest.mark.parametrize(("stride", "size"), [(8, 64), (16, 128)])
def test_x_attention_follows_the_published_rule(stride, size):
    query, key = sharp_attention()
    pattern = XAttention(0.7, stride, size)
    cells = pattern.dense_mask(query, key, scale=SCALE)[0, 0]
    q, k = query[0, 0], key[0, 0]
    per_tile, chosen = size // stride, 0
    for tile in range(LENGTH // size):
        mass = torch.zeros(LENGTH // size)
        for i in range(tile * per_tile, (tile + 1) * per_tile):
            logits = torch.zeros(i + 1)
            for j in range(i + 1):
                for t in range(stride):
                    logits[j] += q[stride - 1 - t + i * stride] @ k[t + j * stride]
            for j, weight in enumerate(torch.softmax(logits * SCALE / stride, 0)):
                mass[j // per_tile] += weight
        kept = {0, tile}
        held = sum(float(mass[j]) for j in kept)
        for block in sorted(set(range(tile)) - kept, key=lambda j: -float(mass[j])):
            if held >= 0.7 * float(mass.sum()):
                break
            kept.add(block)
            held += float(mass[block])
        assert kept_tiles(cells, tile, size) == kept
        chosen += len(kept)
    assert chosen < (LENGTH // size) * (LENGTH // size + 1) // 2, "nothing was left out"


def fewest_blocks(shares, gamma, size):
    """Tokens that cover gamma of the shares, divided by the block size, plus one; as released."""
    running, count = 0.0, 0
    for share in sorted(shares.tolist(), reverse=True):
        running += share
        if running > gamma:
            break
        count += 1
    return (count + 1) // size + 1


@pytest.mark.parametrize("tau", [0.0, 1.0])
def test_flex_prefill_follows_the_published_rule(tau):
    query, key = sharp_attention()
    size, gamma = 64, 0.57
    pattern = FlexPrefill(gamma, tau, min_budget=65, max_budget=LENGTH, block_size=size)
    cells = pattern.dense_mask(query, key, scale=SCALE)[0, 0]
    q, k, blocks = query[0, 0], key[0, 0], LENGTH // size

    rows = range(LENGTH - size, LENGTH)
    weights = exact_rows(q, k, rows)
    vertical = weights.mean(0)
    slash = torch.zeros(LENGTH)
    for i, row in enumerate(rows):
        for j in range(row + 1):
            slash[row - j] += weights[i, j] / size
    counts = {
        name: 2 if tau else max(2, fewest_blocks(shares, gamma, size))
        for name, shares in (("vertical", vertical), ("slash", slash))
    }
    kept = {}
    for name, shares in (("vertical", vertical), ("slash", slash)):
        sums = shares.view(blocks, size).sum(-1)
        sums[0] = math.inf
        kept[name] = set(sums.topk(min(blocks, counts[name])).indices.tolist())

    pairs = set()
    if tau:  # every head is nearer than 1: mean queries decide, over the whole prompt at once
        mean_q, mean_k = q.view(blocks, size, DIM).mean(1), k.view(blocks, size, DIM).mean(1)
        flat = []
        for i in range(blocks):
            for j, w in enumerate(torch.softmax(mean_q[i] @ mean_k[: i + 1].T * SCALE, -1)):
                flat.append((float(w), i, j))
        running = 0.0
        for weight, i, j in sorted(flat, reverse=True):
            running += weight
            if running > gamma * blocks:
                break
            pairs.add((i, j))
        assert 0 < len(pairs) < len(flat)
    for tile in range(blocks):
        expected = {0, tile} | {j for i, j in pairs if i == tile}
        expected |= {j for j in kept["vertical"] if j <= tile}
        expected |= {tile - d for d in kept["slash"] if d <= tile}
        assert kept_tiles(cells, tile, size) == expected


def test_flex_prefill_trusts_mean_queries_where_they_are_exact():
    """Equal queries over keys that are constant within blocks: the proxy is the attention."""
    query, key = sharp_attention()
    rule = FlexPrefill(0.5, 0.1, 1, block_size=64).rule()
    flat = key[0].view(1, -1, 64, DIM)[:, :, :1].expand(-1, -1, 64, -1).reshape(1, LENGTH, DIM)
    same = query[0, :, :1].expand(1, 64, DIM) * 0.1
    mask = AttentionMask(query_offset=LENGTH - 64)
    assert choose(same, flat, mask, rule, scale=SCALE).query_aware.all()
    sharp = choose(query[0, :, -64:] * 5, key[0], mask, rule, scale=SCALE)
    assert not sharp.query_aware.any()


def test_sample_attention_follows_the_published_rule():
    query, key = sharp_attention()
    pattern = SampleAttention(0.5, 1 / 16, 0.1)
    cells = pattern.dense_mask(query, key, scale=SCALE)[0, 0]
    count = LENGTH // 16
    rows = [(t + 1) * LENGTH // count - 1 for t in range(count)]
    sums = exact_rows(query[0, 0], key[0, 0], rows).sum(0)
    columns, held = set(), 0.0
    for column in sums.argsort(descending=True).tolist():
        if held >= 0.5 * float(sums.sum()):
            break
        columns.add(column)
        held += float(sums[column])
    window = math.ceil(0.1 * LENGTH)
    expected = torch.tensor(
        [
            [j <= i and (j in columns or i - j < window) for j in range(LENGTH)]
            for i in range(LENGTH)
        ]
    )
    assert 10 < len(columns) < LENGTH // 2
    assert torch.equal(cells, expected)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: XAttention(stride=24), "stride is 24; allowed: a divisor of 64"),
        (lambda: XAttention(threshold=0), "threshold is 0"),
        (lambda: FlexPrefill(tau=-0.1), "tau is -0.1"),
        (lambda: FlexPrefill(max_budget=5), "max_budget is 5; allowed: min_budget or more"),
        (lambda: SampleAttention(coverage=2.0), "coverage is 2.0"),
        (lambda: SampleAttention(max_columns=0), "max_columns is 0"),
    ],
)
def test_bad_parameter_is_named(make, words):
    with pytest.raises(PatternValueError, match=words):
        make()
