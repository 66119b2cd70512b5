"""Where the benchmark runs and how much, and the shapes of its pieces of work."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu.inputs import Shape

Row = dict[str, Any]
Work = tuple[str, Callable[[], Row]]

VERTICAL, SLASH = 1000, 6096
"""Budgets of the paper's vertical-slash heads for Llama-3-8B (MInference 1.0, table 6)."""


@dataclass(frozen=True)
class Setting:
    """Where to measure and how much. smoke: a dry run on the CPU whose times mean nothing."""

    device: torch.device
    smoke: bool
    lengths: tuple[int, ...]

    def shape(self, length: int) -> Shape:
        if self.smoke:
            return Shape(length, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)
        return Shape(length)
