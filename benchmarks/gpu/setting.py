"""Where the benchmark runs and how much, and the shapes of its pieces of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.inputs import Shape, planted_tensors

Row = dict[str, Any]
Work = tuple[str, Callable[[], Row]]

VERTICAL, SLASH = 1000, 1024
"""Budgets of vertical-slash heads: the default's."""

TOP_K = 100
"""Blocks per query block of the paper's block-sparse heads."""


@dataclass(frozen=True)
class Setting:
    """Where to measure and how much.

    smoke: a dry run on the CPU whose times mean nothing; planted: inputs with the structure of a
    model's, see inputs.planted_tensors, else plain normal ones, of which nothing is sparse;
    layers: of the model.
    """

    device: torch.device
    smoke: bool
    lengths: tuple[int, ...]
    planted: bool = False
    layers: int = 32

    def shape(self, length: int) -> Shape:
        if self.smoke:
            return Shape(length, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)
        return Shape(length)

    def tensors(self, length: int) -> tuple[Tensor, Tensor, Tensor]:
        """Query [1, H, N, D], key and value [1, Hk, N, D] of a layer of this length."""
        shape = self.shape(length)
        return planted_tensors(shape, self.device) if self.planted else shape.tensors(self.device)
