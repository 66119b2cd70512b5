"""What is known about sparse attention before its index is estimated, for who decides about it."""

from __future__ import annotations

import bisect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

WORK_LENGTHS = tuple(1 << power for power in range(7, 25))
"""Lengths at which a pattern tells its density beforehand: 128 to 16M tokens."""


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


@dataclass(frozen=True, slots=True)
class PatternWork:
    """Some heads of one layer that share a pattern, before estimation.

    heads: how many; estimator: the name of its record in mpass.lowering.estimators, "" if the
    parameters alone say which keys are kept; rule: of one head, as that estimator takes it.
    densities: the share of the causal cells that is computed, at each of `WORK_LENGTHS`; exact:
    whether the parameters fix it, else it is what prompts were seen to have. per_kv_head: whether
    the heads of a kv head are estimated together.
    """

    heads: int
    name: str
    estimator: str
    rule: Any
    densities: tuple[float, ...]
    exact: bool = False
    per_kv_head: bool = False

    def density(self, length: int) -> float:
        """At any length, between those that are given on straight lines of logarithms."""
        place = bisect.bisect_left(WORK_LENGTHS, length)
        if place == 0 or place == len(WORK_LENGTHS):
            return self.densities[min(place, len(WORK_LENGTHS) - 1)]
        before, after = self.densities[place - 1], self.densities[place]
        if min(before, after) <= 0:
            return after
        part = math.log2(length / WORK_LENGTHS[place - 1])
        return before ** (1 - part) * after**part


@dataclass(frozen=True, slots=True)
class LayerWork:
    """An attention of a graph before it runs: all that its cost depends on but the lengths.

    patterns: of all query heads; window: in tokens, 0 for none; replayed: whether a CUDA graph
    holds the launches, so that the host does not take part.
    """

    dtype: torch.dtype
    head_dim: int
    value_dim: int
    kv_heads: int
    patterns: tuple[PatternWork, ...]
    causal: bool = True
    window: int = 0
    replayed: bool = False

    @property
    def heads(self) -> int:
        """Query heads."""
        return sum(part.heads for part in self.patterns)


@dataclass(frozen=True, slots=True)
class LeastLengths:
    """From how many keys, and how many queries, on sparse attention is worth it.

    area: least product of both, for chunks of a prompt; 0 for none.
    """

    keys: int
    queries: int
    area: int = 0
