"""Keys and values of one sequence out of vLLM's pages, whose layout is the kernels' own business.

A page of a head holds the keys of `size` tokens, then their values, D numbers each. On GPUs they
stand token after token, key beside value. On CPUs each half is laid out as the instruction set of
vLLM's kernels wants it: keys may be transposed, or in tiles. So the layout is not assumed but
learnt: a page of numbered elements is written by vLLM's own kernel, and its order is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT_BITS = 8
"""Bits of an element's number that are written at once: every dtype holds 0 to 255 exactly."""


@dataclass(frozen=True, slots=True, eq=False)
class HalfLayout:
    """How the keys, or the values, of a page stand.

    columns: whether they stand [D, size] instead of [size, D].
    order: the place of each element (token, d), if they stand in neither way.
    """

    columns: bool = False
    order: Tensor | None = None

    def rows(self, halves: Tensor, size: int) -> Tensor:
        """[pages, Hk, size * D] -> [pages, Hk, size, D], a view where the layout allows one."""
        if self.order is not None:
            halves = halves[..., self.order]
        if self.columns:
            return halves.unflatten(-1, (-1, size)).transpose(-1, -2)
        return halves.unflatten(-1, (size, -1))


@dataclass(frozen=True, slots=True, eq=False)
class PageLayout:
    """How a page of [size, 2 * D] numbers stands in memory.

    halves: the layouts of its keys and of its values, one half after the other; None where the key
    and the value of a token stand beside one another, as on GPUs.
    """

    halves: tuple[HalfLayout, HalfLayout] | None = None


def gather(pages: Tensor, blocks: Tensor, length: int, layout: PageLayout) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence, [1, Hk, length, D] each, copied out of its pages.

    pages: [all pages, Hk, size, 2 * D], of any strides.
    blocks: the numbers of the sequence's pages in order, at least as many as `length` needs.
    length: its tokens.
    """
    size = pages.shape[2]
    numbers = blocks[: -(-length // size)].long()
    if layout.halves is None:
        found = pages.index_select(0, numbers)
        parts = found.chunk(2, dim=-1)
    else:
        both = pages.view(*pages.shape[:2], 2, -1)  # never a copy of the whole cache
        sides = (both[:, :, side].index_select(0, numbers) for side in range(2))
        parts = tuple(
            half.rows(side, size) for half, side in zip(layout.halves, sides, strict=True)
        )
    key, value = (
        part.transpose(0, 1).reshape(1, pages.shape[1], -1, part.shape[-1])[:, :, :length]
        for part in parts
    )
    return key, value


def learn_layout(
    write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object],
    size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> PageLayout:
    """The layout of pages that `write` fills, asked of `write` itself.

    write: `write(key, value, key_pages, value_pages, slots)` stores key and value, [tokens, 1, D],
        into pages of one head, [pages, 1, size, D] each, at the numbers `slots`.
    size: tokens of a page.
    dtype: of the pages.

    Raises ValueError if what is read back is not every element once.
    """
    halves = [learn_half(write, side, size, head_dim, dtype) for side in range(2)]
    return PageLayout((halves[0], halves[1]))


def learn_half(
    write: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], object],
    side: int,
    size: int,
    head_dim: int,
    dtype: torch.dtype,
) -> HalfLayout:
    """The layout of the keys (side 0) or of the values (side 1)."""
    count = size * head_dim
    numbers = torch.arange(count).view(size, 1, head_dim)
    found = torch.zeros(count, dtype=torch.long)
    for shift in range(0, max(1, count.bit_length()), DIGIT_BITS):
        digits = ((numbers >> shift) & ((1 << DIGIT_BITS) - 1)).to(dtype)
        halves = torch.zeros(1, 1, 2 * size, head_dim, dtype=dtype).chunk(2, dim=2)
        write(digits, digits, halves[0], halves[1], torch.arange(size))
        found += halves[side].reshape(-1).long() << shift
    plain = torch.arange(count)
    if not torch.equal(found.sort().values, plain):
        raise ValueError(f"pages of {size} x {head_dim} {dtype} do not hold every element once")
    order = torch.empty_like(found)
    order[found] = plain
    if torch.equal(order, plain):
        return HalfLayout()
    if torch.equal(order, plain.view(head_dim, size).t().reshape(-1)):
        return HalfLayout(columns=True)
    return HalfLayout(order=order)
