"""Tokens of a picture or a video in the order of tiles, so that a block is a compact piece of it.

Attention that sees both ways and has no positions in it does not know the order of its tokens:
query, key and value may be put into another order, and the output back, and the same numbers come
out. In raster order 64 neighbouring tokens are a part of one row of patches; in the order of tiles
they are 8 by 8 patches, or 4 by 4 by 4 of a video (the tiles of STA, arXiv 2502.04507, and of VSA,
arXiv 2505.13389). Every pattern that chooses blocks may then choose places.

The order of a grid whose sides are no multiples of the tile's: what stands before the grid, whole
tiles row by row, then the cut tiles at the edges, then what stands behind. So that each whole tile
is one block of the index, the last tokens of the grid fill up the block that the tokens before the
grid leave open. Inside of a tile tokens lie in Z-order (Morton's): a run of 16 of them is a piece
of 4 by 4.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from mpass.errors import GridError, OptionValueError
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.index import BLOCK

SQUARE = "square"
"""The shape of a grid whose side follows from the number of tokens."""

CONTENT = "content"
"""The shape of no grid: tokens that are alike stand together (mpass.lowering.similar_order)."""

TILES = {2: (8, 8), 3: (4, 4, 4)}
"""The tile of a grid, by its number of dimensions."""

MOST_UNSAID = 16
"""So many tokens may stand before a grid without being told of: a class token, registers."""


@dataclass(frozen=True, slots=True)
class Grid:
    """How the tokens of an attention lie on a picture or in a video.

    shape: patches per axis, the last axis running fastest: (height, width), or (frames, height,
    width); "square" takes the largest square that the tokens fill. "content" is no grid: per head
    tokens that are alike stand together, wherever they are.
    prefix: tokens before the grid, as class, registers or text. None takes what is left of the
    length, up to 16.
    suffix: tokens behind the grid.
    tile: patches per axis of a tile, 64 in all; () for (8, 8) and (4, 4, 4).

    Raises OptionValueError for a number that cannot be.
    """

    shape: tuple[int, ...] | Literal["square", "content"]
    prefix: int | None = None
    suffix: int = 0
    tile: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.shape not in (SQUARE, CONTENT):
            object.__setattr__(self, "shape", numbers("shape", self.shape))
        tile = TILES[self.dimensions] if self.tile == () else numbers("tile", self.tile)
        object.__setattr__(self, "tile", tile)
        if len(tile) != self.dimensions or math.prod(tile) != BLOCK:
            allowed = f"{self.dimensions} numbers whose product is {BLOCK}"
            raise OptionValueError("Grid.tile", tile, allowed)
        for name in ("prefix", "suffix"):
            value = getattr(self, name)
            if not (is_count(value, 0) or (name == "prefix" and value is None)):
                raise OptionValueError(f"Grid.{name}", value, "a number of tokens, 0 or more")
        if self.by_content and (self.prefix is not None or self.suffix or tile != TILES[2]):
            raise OptionValueError("Grid", "content", "without prefix, suffix and tile")

    @property
    def by_content(self) -> bool:
        """Whether no grid is meant, but tokens that are alike."""
        return self.shape == CONTENT

    @property
    def dimensions(self) -> int:
        return 2 if isinstance(self.shape, str) else len(self.shape)

    def values(self) -> dict[str, Any]:
        """The fields as JSON has them, those that say nothing left out."""
        given = {name: value for name, value in asdict(self).items() if value is not None}
        given |= {"tile": list(self.tile)}
        if not isinstance(self.shape, str):
            given["shape"] = list(self.shape)
        if self.tile == TILES[self.dimensions]:
            del given["tile"]
        return given if self.suffix else {k: v for k, v in given.items() if k != "suffix"}

    def fit(self, length: int, where: str) -> Grid:
        """The same in numbers, for `length` tokens. Raises GridError if they do not fill it.

        where: which attention has them, for the error.
        """
        if self.by_content:
            return self
        before, shape = self.prefix or 0, self.shape
        if isinstance(shape, str):
            side = math.isqrt(max(0, length - before - self.suffix))
            shape = (side, side)
        left = length - math.prod(shape) - self.suffix
        unsaid = self.prefix is None and 0 <= left <= MOST_UNSAID
        if min(shape) and (unsaid or left == before):
            return Grid(shape, left, self.suffix, self.tile)
        said = f"up to {MOST_UNSAID}" if self.prefix is None else str(before)
        raise GridError(
            f"{where} has {length} tokens, and the grid {self.values()} takes {said} before "
            f"{by(shape)} patches and {self.suffix} behind; give mpass.Grid(shape, prefix=, "
            f"suffix=) with the tokens that stand before and behind the patches, or layers of "
            f"another length a grid of their own (mpass.LayerConfig(grid=...))"
        )

    def arguments(self) -> tuple[list[int], list[int], int, int]:
        """What `minference::tile_order` takes; `from_arguments` turns it back."""
        shape = [] if isinstance(self.shape, str) else list(self.shape)
        return shape, list(self.tile), -1 if self.prefix is None else self.prefix, self.suffix

    def __str__(self) -> str:
        if self.by_content:
            return "in the order of their content"
        shape = self.shape if isinstance(self.shape, str) else by(self.shape)
        return f"{shape} in tiles of {by(self.tile)}"


def from_arguments(shape: Sequence[int], tile: Sequence[int], prefix: int, suffix: int) -> Grid:
    """The Grid that gave these `arguments`."""
    sides: Any = tuple(shape) or SQUARE
    return Grid(sides, None if prefix < 0 else prefix, suffix, tuple(tile))


def by(sizes: Sequence[int]) -> str:
    """Sizes in words: `37 x 37`."""
    return " x ".join(map(str, sizes))


def is_count(value: object, least: int) -> bool:
    """Whether a value is a whole number of `least` or more."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def numbers(name: str, value: object) -> tuple[int, ...]:
    """Two or three numbers of patches. Raises OptionValueError for anything else."""
    fits = isinstance(value, (tuple, list)) and len(value) in TILES
    if not fits or not all(is_count(one, 1) for one in value):  # type: ignore[attr-defined]
        kinds = "two or three numbers, 1 or more" + (' or "square"' if name == "shape" else "")
        raise OptionValueError(f"Grid.{name}", value, kinds)
    return tuple(value)  # type: ignore[arg-type]


def as_grid(value: object) -> Grid:
    """A Grid from one, from its shape, or from its fields by name. Raises OptionValueError."""
    if isinstance(value, Grid):
        return value
    if isinstance(value, Mapping) and "shape" in value and set(value) <= set(FIELDS):
        return Grid(**value)
    if isinstance(value, (tuple, list)) or value in (SQUARE, CONTENT):
        return Grid(value)  # type: ignore[arg-type]
    raise OptionValueError("grid", value, 'a mpass.Grid, (height, width), "square" or "content"')


FIELDS = ("shape", "prefix", "suffix", "tile")


def tile_order_of(grid: Grid, device: torch.device) -> Tensor:
    """Which token stands at each place in the order of tiles of a grid in numbers: int64 [N]."""
    shape, _, prefix, suffix = grid.arguments()
    cells = math.prod(shape)
    rest = torch.arange(cells, device=device)
    number, cut, inner = (torch.zeros_like(rest) for _ in range(3))
    places: list[tuple[Tensor, int]] = []
    step = 1
    for size, side in zip(reversed(shape), reversed(grid.tile), strict=True):
        place = rest % size
        rest = rest // size
        number = number + place // side * step
        step *= -(-size // side)
        cut = cut | (place >= size // side * side)
        places.insert(0, (place % side, side))
    for bit in reversed(range(max(grid.tile).bit_length())):
        for place, side in places:
            if side > 1 << bit:
                inner = inner * 2 + (place >> bit & 1)
    order = torch.argsort((cut * step + number) * BLOCK + inner)
    order = torch.roll(order, min(-prefix % BLOCK, cells)) + prefix
    first = torch.arange(prefix, device=device)
    last = torch.arange(suffix, device=device) + prefix + cells
    return torch.cat([first, order, last])


@define_op(
    "tile_order",
    "(Tensor query, int[] shape, int[] tile, int prefix, int suffix) -> (Tensor, Tensor)",
    chooses=True,
)
def tile_order(
    query: Tensor, shape: Sequence[int], tile: Sequence[int], prefix: int, suffix: int
) -> tuple[Tensor, Tensor]:
    """Which token stands at each place in the order of tiles, and the place of each token.

    query [B, H, N, D] -> int64 [N], twice. It takes a few operations over N numbers, once per
    graph. shape, tile, prefix, suffix: `Grid.arguments`. Raises GridError where the tokens do not
    fill the grid, which planning has seen to where it knew their number.
    """
    grid = from_arguments(shape, tile, prefix, suffix).fit(query.shape[2], "an attention")
    order = tile_order_of(grid, query.device)
    places = torch.arange(len(order), device=query.device)
    return order, torch.empty_like(order).scatter_(0, order, places)


@fake_of("tile_order")
def _(
    query: Tensor, shape: Sequence[int], tile: Sequence[int], prefix: int, suffix: int
) -> tuple[Tensor, Tensor]:
    order = query.new_empty(query.shape[2], dtype=torch.int64)
    return order, torch.empty_like(order)
