"""Block-max and block top-p: their rules written out once more by loops."""

from __future__ import annotations

import pytest
import torch

from mpass.errors import PatternValueError
from mpass.patterns.block_max import BlockMax
from mpass.patterns.block_top_p import BlockTopP
from tests.helpers.truth import random_attention

LENGTH, DIM, SCALE = 1024, 16, 0.25


def tile_scores(query, key, tile, size):
    """FlashPrefill's score of each block of keys before the tile, by loops."""
    logits = torch.full((size, tile), -torch.inf)
    for row in range(size):
        for block in range(tile):
            mean = key[block * size : (block + 1) * size].mean(0)
            logits[row, block] = query[tile * size + row] @ mean * SCALE
    maxima = logits.amax(0)
    sums = (logits - maxima).exp().sum(0)
    return sums * (maxima - maxima.max()).exp()


def kept_tiles(cells, tile, size):
    """Blocks of keys that the last row of a tile sees."""
    row = cells[(tile + 1) * size - 1].view(-1, size)
    return set(row.any(-1).nonzero()[:, 0].tolist())


@pytest.mark.parametrize("size", [64, 128])
def test_block_max_keeps_what_comes_near_the_best_block(size):
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    pattern = BlockMax(0.8, size, sink_blocks=1, local_blocks=2, last_blocks=1)
    cells = pattern.dense_mask(query * 2, key, scale=SCALE)[0, 0]
    tiles = LENGTH // size
    chosen = 0
    for tile in range(1, tiles - 1):
        scores = tile_scores(query[0, 0] * 2, key[0, 0], tile, size)
        expected = {j for j in range(tile) if scores[j] >= 0.8 * scores.max()}
        expected |= {0, tile, tile - 1}
        assert kept_tiles(cells, tile, size) == expected
        chosen += len(expected) - len({0, tile, tile - 1})
    assert kept_tiles(cells, tiles - 1, size) == set(range(tiles))
    assert 0 < chosen < (tiles - 3) * (tiles - 2) // 2, "the rule had nothing to choose"


def test_block_top_p_keeps_the_fewest_blocks_that_hold_the_mass():
    query, key, _ = random_attention(heads=1, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    pattern = BlockTopP(0.4, 64, sink_blocks=1, local_blocks=1, last_blocks=0)
    cells = pattern.dense_mask(query * 2, key, scale=SCALE)[0, 0]
    for tile in range(1, LENGTH // 64):
        scores = tile_scores(query[0, 0] * 2, key[0, 0], tile, 64)
        kept, held = {0, tile}, float(scores[0])
        for block in sorted(range(1, tile), key=lambda j: -float(scores[j])):
            if held >= 0.4 * float(scores.sum()):
                break
            kept.add(block)
            held += float(scores[block])
        assert kept_tiles(cells, tile, 64) == kept


@pytest.mark.parametrize("cls", [BlockMax, BlockTopP])
def test_blocks_on_the_absolute_grid_whatever_the_chunk(cls):
    """A chunk of a prompt whose tiles are whole selects what the whole prompt selects there."""
    query, key, _ = random_attention(heads=2, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    pattern = cls(0.5, 128, 1, 1, 0)
    whole = pattern.dense_mask(query, key)
    chunk = pattern.dense_mask(query[:, :, 640:], key)
    assert torch.equal(whole[:, :, 640:], chunk)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: BlockMax(share=0.0), "share is 0.0"),
        (lambda: BlockMax(block_size=100), "a multiple of 64"),
        (lambda: BlockMax(max_blocks=8), "max_blocks is 8; allowed: 12 or more"),
        (lambda: BlockTopP(mass=True), "mass is True"),
    ],
)
def test_bad_parameter_is_named(make, words):
    with pytest.raises(PatternValueError, match=words):
        make()
