"""The order of tiles: every token once, whole tiles in whole blocks, runs of 16 compact."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from mpass.errors import GridError, OptionValueError
from mpass.lowering.index import BLOCK
from mpass.lowering.tiles import Grid, as_grid, tile_order, tile_order_of

CASES = [
    Grid((16, 24), 0, 0, (8, 8)),
    Grid((51, 51), 1, 0, (8, 8)),
    Grid((5, 300), 4, 0, (8, 8)),
    Grid((19, 37), 70, 9, (4, 16)),
    Grid((9, 13, 10), 5, 7, (4, 4, 4)),
    Grid((3, 8, 16), 64, 0, (1, 8, 8)),
]


@pytest.mark.parametrize("tiles", CASES, ids=str)
def test_whole_tiles_are_blocks_and_every_token_stands_once(tiles):
    length = math.prod(tiles.shape) + tiles.prefix + tiles.suffix
    query = torch.empty(1, 1, length, 1)
    order, places = tile_order(query, *tiles.arguments())
    cells, first = math.prod(tiles.shape), tiles.prefix
    assert sorted(order.tolist()) == list(range(length))
    assert torch.equal(order[places], torch.arange(length))
    assert order[:first].tolist() == list(range(first))
    assert order[first + cells :].tolist() == list(range(first + cells, length))
    coordinates = list(itertools.product(*map(range, tiles.shape)))
    whole = {}
    for number, place in enumerate(coordinates):
        tile = tuple(p // side for p, side in zip(place, tiles.tile, strict=True))
        whole.setdefault(tile, set()).add(first + number)
    whole = {tile: tokens for tile, tokens in whole.items() if len(tokens) == BLOCK}
    blocks = [set(block.tolist()) for block in order.split(BLOCK)]
    kept = sum(tokens in blocks for tokens in whole.values())
    # The last of them may have to fill up the block that the tokens before the grid leave open.
    cut = cells - BLOCK * len(whole)
    assert kept >= len(whole) - (cut < -first % BLOCK)


def test_sixteen_tokens_in_a_row_are_four_by_four():
    order = tile_order_of(Grid((24, 32), 0, 0, (8, 8)), torch.device("cpu"))
    for run in order.split(16):
        rows, columns = run // 32, run % 32
        assert rows.max() - rows.min() == columns.max() - columns.min() == 3
        assert len(set(run.tolist())) == 16


@pytest.mark.parametrize(
    ("grid", "length", "expected"),
    [
        (Grid((51, 51)), 2602, Grid((51, 51), 1, 0, (8, 8))),
        (Grid("square"), 2602, Grid((51, 51), 1, 0, (8, 8))),
        (Grid("square", prefix=5), 2305 + 4, Grid((48, 48), 5, 0, (8, 8))),
        (Grid((64, 64), prefix=512), 4608, Grid((64, 64), 512, 0, (8, 8))),
        (Grid((64, 64), suffix=77), 4173, Grid((64, 64), 0, 77, (8, 8))),
        (Grid((13, 30, 45), 226, tile=(2, 4, 8)), 17776, Grid((13, 30, 45), 226, 0, (2, 4, 8))),
    ],
    ids=str,
)
def test_a_grid_takes_what_its_tokens_fill(grid, length, expected):
    assert grid.fit(length, "it") == expected
    assert as_grid(grid.values()) == grid


@pytest.mark.parametrize(
    ("grid", "length", "words"),
    [
        (Grid((51, 51)), 2600, "layer 3 has 2600 tokens.*takes up to 16 before 51 x 51 patches"),
        (Grid((51, 51)), 5330, "has 5330 tokens"),
        (Grid((51, 51), prefix=2), 2602, "takes 2 before 51 x 51 patches and 0 behind"),
        (Grid("square", prefix=1, suffix=3), 2607, "takes 1 before 51 x 51 patches and 3 behind"),
        (Grid("square", prefix=300), 200, "takes 300 before 0 x 0"),
    ],
    ids=str,
)
def test_tokens_that_do_not_fill_a_grid_are_refused(grid, length, words):
    with pytest.raises(GridError, match=words):
        grid.fit(length, "layer 3")


@pytest.mark.parametrize(
    "given", [37, "round", (37,), (2, 3, 4, 5), (0, 3), (True, 3), {"sides": (3, 3)}, {"shape": 3}]
)
def test_what_is_no_grid_is_refused(given):
    with pytest.raises(OptionValueError, match=r"grid|Grid\.shape"):
        as_grid(given)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tile": (8, 4)}, "Grid.tile"),
        ({"tile": (4, 4, 4)}, "Grid.tile"),
        ({"prefix": -1}, "Grid.prefix"),
        ({"suffix": 1.5}, "Grid.suffix"),
    ],
)
def test_numbers_that_cannot_be_are_refused(fields, words):
    with pytest.raises(OptionValueError, match=words):
        Grid((8, 8), **fields)


def test_the_op_passes_opcheck():
    given = (torch.randn(1, 2, 48, 3), [5, 9], [8, 8], 2, 1)
    torch.library.opcheck(torch.ops.minference.tile_order.default, given)
