"""From measurements to what each head costs and is expected to lose with each candidate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mpass.calibration.kernel_cost import KernelCost
from mpass.calibration.measure import LayerMeasures
from mpass.calibration.probe import Input
from mpass.calibration.settings import Settings


def head_costs(
    items: Sequence[Input],
    measures: Sequence[dict[int, LayerMeasures]],
    layers: Sequence[int],
    kernel: KernelCost,
) -> Tensor:
    """Seconds of each head with each candidate on the longest texts: fp64 [L, H, C]."""
    longest = max(item.length for item in items if item.kind == "text")
    texts = [
        m for i, m in zip(items, measures, strict=True) if i.kind == "text" and i.length == longest
    ]
    rows = []
    # Finding keys takes as long in every layer; the median is not moved by a busy machine.
    estimation = torch.stack([m[n].estimation for m in texts for n in layers]).median(0).values
    for layer in layers:
        work = torch.stack([kernel.seconds(m[layer].tiles, m[layer].columns) for m in texts])
        heads = work.shape[-1]
        cost = work.mean(0) + estimation[:, None] / heads
        cost[0] = kernel.dense_layer / heads
        rows.append(cost.T)
    return torch.stack(rows)


def least_costs(measures: Mapping[int, LayerMeasures], kernel: KernelCost) -> tuple[float, float]:
    """Seconds that no choice of patterns is below, known before all layers are measured.

    measures: of the layers measured so far on one prompt. The first number is of these layers, the
    second of each layer still to come: what finding the keys and the diagonal tiles alone cost.
    """
    estimation = torch.stack([m.estimation for m in measures.values()]).amin(0)
    least, floor = 0.0, kernel.dense_layer
    for measured in measures.values():
        heads = measured.tiles.shape[-1]
        cost = kernel.seconds(measured.tiles, measured.columns) + estimation[:, None] / heads
        cost[0] = kernel.dense_layer / heads
        least += float(cost.amin(0).sum())
        tiles = measured.tiles[0].amin()  # dense: rows (rows + 1) / 2 tiles
        rows = float(((8 * tiles + 1).sqrt() - 1) / 2)
        bare = heads * rows * kernel.tile + estimation[1:]
        if len(bare):
            floor = min(floor, float(bare.min()))
    return least, floor


def weigh(items: Sequence[Input], values: Sequence[Sequence[Tensor]], settings: Settings) -> Tensor:
    """Mean over inputs of per-layer [C, H] values, retrieval weighted: fp64 [L, H, C]."""
    weights = input_weights(items, settings)
    per_input = [torch.stack([v.T for v in layers]) for layers in values]
    total = sum(w * v for w, v in zip(weights, per_input, strict=True))
    return torch.as_tensor(total) / sum(weights)


def input_weights(items: Sequence[Input], settings: Settings) -> list[float]:
    """1 shared by the texts, retrieval_weight by the retrieval prompts, in shares of their lengths.

    Long prompts are what sparsity is for; in short ones most patterns keep everything.
    """
    total = {kind: sum(i.length for i in items if i.kind == kind) for kind in ("text", "retrieval")}
    share = {"text": 1.0, "retrieval": settings.retrieval_weight}
    return [share[item.kind] * item.length / total[item.kind] for item in items]


def predicted_losses(
    items: Sequence[Input],
    measures: Sequence[dict[int, LayerMeasures]],
    layers: Sequence[int],
    slopes: dict[str, Tensor],
    errors: Tensor,
    recalls: Tensor,
    settings: Settings,
) -> Tensor:
    """What the objective says each head loses with each candidate: fp64 [L, H, C]; dense is 0."""
    if settings.objective == "recall":
        losses = 1.0 - recalls
    elif settings.objective == "error":
        losses = errors.clone()
    else:
        losses = torch.zeros_like(errors)
        weights = input_weights(items, settings)
        for weight, item, measured in zip(weights, items, measures, strict=True):
            error = torch.stack([measured[layer].error.T for layer in layers])
            losses += weight * slopes[item.kind][:, None, None] * error
    losses[..., 0] = 0.0
    return losses
