"""What a calibration found: every measurement, the choice, and the config that follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mpass.calibration.kernel_cost import KernelCost
from mpass.config.sparse_config import SparseConfig
from mpass.patterns.base import Pattern


@dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome. Letters: L layers searched, H heads, C candidates.

    layers: their numbers [L]; sizes: query heads H and kv heads; losses, costs, errors, recalls:
    fp64 [L, H, C]; slopes: divergence per unit of squared error of each layer, fp64 [L] per kind of
    input; chosen: int64 [L, H]; dense_seconds: attention time of the dense model; length:
    of the longest text, tokens; checks: of held-out inputs, see check_inputs.
    """

    config: SparseConfig
    candidates: tuple[Pattern, ...]
    layers: list[int]
    sizes: tuple[int, int]
    losses: Tensor
    costs: Tensor
    errors: Tensor
    recalls: Tensor
    slopes: dict[str, Tensor]
    chosen: Tensor
    kernel: KernelCost
    dense_seconds: float
    length: int
    checks: list[dict[str, Any]] = field(default_factory=list)

    def uniform(self, budget: float) -> int:
        """The candidate that, used by every head, loses least within `budget` seconds."""
        cost, loss = self.costs.sum((0, 1)), self.losses.sum((0, 1))
        fits = torch.where(cost <= budget, loss, torch.inf)
        return int(fits.argmin() if bool(torch.isfinite(fits).any()) else cost.argmin())

    @property
    def chosen_seconds(self) -> float:
        return float(self.costs.gather(2, self.chosen[..., None]).sum())


def make_config(
    chosen: Tensor,
    layers: Sequence[int],
    candidates: Sequence[Pattern],
    sizes: tuple[int, int],
    provenance: Mapping[str, Any] | None = None,
) -> SparseConfig:
    """The SparseConfig of a choice [L, H]; sizes: query heads and kv heads."""
    patterns = {
        layer: [candidates[int(c)] for c in row] for layer, row in zip(layers, chosen, strict=True)
    }
    whole = list(layers) == list(range(len(layers)))
    return SparseConfig(
        layers=patterns,
        num_layers=len(layers) if whole else None,
        num_heads=sizes[0],
        num_kv_heads=sizes[1],
        provenance=provenance or {},
    )
