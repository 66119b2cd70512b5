"""What is known about sparse attention before its index is estimated, for who decides about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class EstimatedWork:
    """One causal layer's heads of one pattern, before estimation; heads count the batch, too.

    min_density: the least share of the causal cells that is computed; exact: whether that is all;
    name: of the pattern with its parameters; estimate: its estimator, of query [1, group, N, D] and
    key [1, 1, N, D], to be timed.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    heads: int
    kv_heads: int
    length: int
    min_density: float
    exact: bool
    name: str
    estimate: Callable[[Tensor, Tensor], object]
