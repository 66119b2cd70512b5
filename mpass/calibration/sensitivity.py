"""What an error in one layer does to the predictions of the whole model."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.calibration.instrument import AttentionOperands, attend_dense, attend_sparse
from mpass.calibration.probe import Input, Probe, shorten
from mpass.calibration.settings import OnProgress, Settings
from mpass.calibration.state import State
from mpass.lowering.index import BLOCK
from mpass.patterns.a_shape import AShape

DISTURBANCE = AShape(16, BLOCK)
"""What a layer is made sparse with to see how much it matters. It must lose something in every head
at any length: a pattern that adapts may keep everything of a short text, and the quotient of
divergence and error would be one of rounding errors."""


def measure_slopes(
    probe: Probe,
    items: Sequence[Input],
    layers: Sequence[int],
    settings: Settings,
    kept: State,
    on_progress: OnProgress,
) -> dict[str, Tensor]:
    """Divergence per unit of squared output error of each layer: fp64 [L] per kind of input.

    One text and the short retrieval prompts are run once per layer, that layer alone made sparse.
    """
    if settings.objective != "divergence":
        return {}
    slopes = {}
    for kind in dict.fromkeys(item.kind for item in items):
        found = torch.zeros(2, len(layers), dtype=torch.float64)
        for number, item in enumerate(disturbed_inputs(items, kind, settings)):
            name = f"slope {kind} {number}"
            found += measure_input(probe, item, layers, name, kept, on_progress)
        divergence, error = found
        slopes[kind] = torch.where(error > 0, divergence / error.clamp(min=1e-300), 0.0)
    return slopes


def disturbed_inputs(items: Sequence[Input], kind: str, settings: Settings) -> list[Input]:
    """What is run once per layer: the first text, cut, or the retrieval prompts that are short.

    The shortest retrieval prompt if none is: cutting one would take its needle or its question.
    """
    of_kind = [item for item in items if item.kind == kind]
    if kind == "text":
        return [shorten(of_kind[0], settings.sensitivity_length)]
    short = [item for item in of_kind if item.length <= settings.sensitivity_length]
    return short or [min(of_kind, key=lambda item: item.length)]


def measure_input(
    probe: Probe,
    item: Input,
    layers: Sequence[int],
    name: str,
    kept: State,
    on_progress: OnProgress,
) -> Tensor:
    """Divergence and squared error, each layer alone made sparse: fp64 [2, L]."""
    missing = [layer for layer in layers if f"{name} {layer}" not in kept]
    exact = probe.run(item.tokens, attend_dense) if missing else None
    for done, layer in enumerate(missing):
        on_progress(f"sensitivity to {item.kind}: layer {layer}", done, len(missing))
        error = 0.0

        def attend(operands: AttentionOperands, layer: int = layer) -> Tensor:
            nonlocal error
            out = attend_dense(operands)
            if operands.layer != layer:
                return out
            sparse = attend_sparse(operands, [DISTURBANCE] * operands.num_heads)
            gap = (sparse - out)[:, :, item.rows.to(out.device)].double()
            error = float(gap.square().sum((1, 3)).mean())
            return sparse

        sparse = probe.run(item.tokens, attend)
        assert exact is not None
        kept[f"{name} {layer}"] = [max(0.0, probe.divergence(exact, sparse, item)), error]
    return torch.tensor([kept[f"{name} {layer}"] for layer in layers], dtype=torch.float64).T
