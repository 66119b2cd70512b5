"""What a program is that stays dense for a reason, and the tensors that it is run on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

N = 192


@dataclass(frozen=True)
class Case:
    """A program of query, key and value, and the reason for which it stays dense.

    shapes: settings of `tensors`; options: of the compile; dynamic: (argument, dimension) pairs
    whose size is not known when compiling; all_dynamic: no size is; grad: gradients are recorded.
    """

    program: Callable[..., Any]
    words: str
    shapes: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    dynamic: tuple[tuple[int, int], ...] = ()
    all_dynamic: bool = False
    grad: bool = False


def tensors(
    *,
    batch: int = 1,
    heads: int = 4,
    kv_heads: int = 4,
    value_heads: int | None = None,
    queries: int = N,
    keys: int = N,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
) -> tuple[Tensor, Tensor, Tensor]:
    """Query [B, H, Nq, D], key [B, Hk, Nk, D] and value [B, Hv, Nk, D]."""
    shapes = [(heads, queries), (kv_heads, keys), (value_heads or kv_heads, keys)]
    query, key, value = (
        torch.randn(batch, *shape, dim, dtype=dtype, device=device) for shape in shapes
    )
    return query, key, value


def causal() -> Tensor:
    return torch.arange(N)[:, None] >= torch.arange(N)
