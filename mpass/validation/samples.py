"""Values to hold a proof against: real inputs, made-up padding, and the rows that are looked at."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import _disable_current_modes

from mpass.graph.nodes import example
from mpass.validation.slices import (
    is_number,
    number_now,
    real_tensor,
    shape_now,
    value_of,
)


def random_tensor(node: fx.Node, generator: torch.Generator) -> Tensor:
    """A tensor as a node stands for: normal, or zeros and ones."""
    fake, shape = example(node), shape_now(node)
    if fake.dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(fake.dtype).to(fake.device)
    return random_padding(shape, generator).to(fake.dtype).to(fake.device)


def random_padding(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Ones with zeros at the left or at the right of each row, and with holes."""
    size = shape[-1] if shape else 1
    rows = math.prod(shape[:-1])
    cut = torch.randint(0, max(1, size // 2), (rows, 1), generator=generator)
    at = torch.arange(size)
    left = torch.arange(rows)[:, None] % 2 == 0
    kept = torch.where(left, at >= cut, at < size - cut)
    kept &= torch.rand(rows, size, generator=generator) > 0.05
    return kept.reshape(shape)


def next_node(node: fx.Node) -> fx.Node:
    return node.next


def leaf_value(leaf: fx.Node, invented: bool, generator: torch.Generator) -> tuple[Any, bool]:
    """The value of an input, and whether it is a mask of zeros and ones that can be invented."""
    value = value_of(leaf)
    if is_number(value) and value is not None:
        return number_now(value), False
    real = real_tensor(leaf)
    if real is None and not isinstance(value, Tensor):
        owner: Any = leaf.graph.owning_module
        return getattr(owner, str(leaf.target)), False
    if real is None:
        return random_tensor(leaf, generator), example(leaf).dtype == torch.bool
    flags = not real.dtype.is_floating_point and real.numel() > 1
    flags = flags and bool(((real == 0) | (real == 1)).all())
    if invented and flags and leaf.op == "placeholder":
        return random_padding(tuple(real.shape), generator).to(real), True
    return real.clone(), flags and leaf.op == "placeholder"


def rows_to_check(queries: int, most: float) -> Tensor:
    """All query rows, or the first, the last and random ones between."""
    if queries <= most:
        return torch.arange(queries)
    count = max(4, int(most))
    ends = torch.arange(count // 4)
    generator = torch.Generator().manual_seed(queries)
    between = torch.randint(0, queries, (count - 2 * len(ends),), generator=generator)
    return torch.cat([ends, between, queries - 1 - ends]).unique()


class quiet:
    """No gradients, no tracing, and random numbers as they were before."""

    def __enter__(self) -> None:
        self.random = torch.random.get_rng_state()
        self.modes = _disable_current_modes()
        self.modes.__enter__()
        self.gradients = torch.no_grad()
        self.gradients.__enter__()

    def __exit__(self, *error: Any) -> None:
        self.gradients.__exit__(*error)
        self.modes.__exit__(*error)
        torch.random.set_rng_state(self.random)
