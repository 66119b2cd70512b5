"""What attention at a step would lose if it were not whole, measured while every step is.

At each step the output is held against what older steps would have given: the output of such a
step, and its residual added to sparse attention over its keys. `mpass.search_denoising` chooses
from these numbers. Attention stays that of dense steps, so that the samples do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from mpass.lowering.density import density
from mpass.lowering.device import Lowering
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs


@dataclass(slots=True, eq=False)
class Anchor:
    """A whole step that later ones might refer to: its output, its residual and its keys."""

    output: Tensor
    residual: Tensor
    index: SparseIndex


@dataclass(slots=True, eq=False)
class Probe:
    """Squared relative errors of one sampling.

    spans: [start, stop) of the ranges of steps, and `every` the distances of whole steps in them.
    residual, output: by (place of the attention, step, step of the anchor). cells: per place, the
    share of cells that its pattern computes, of each anchor.
    """

    spans: tuple[tuple[int, int], ...]
    every: tuple[int, ...]
    residual: dict[tuple[int, int, int], float] = field(default_factory=dict)
    output: dict[tuple[int, int, int], float] = field(default_factory=dict)
    cells: dict[int, list[float]] = field(default_factory=dict)
    anchors: dict[tuple[int, int], Anchor] = field(default_factory=dict)

    def attend(
        self, lowering: Lowering, inputs: AttentionInputs, index: SparseIndex, step: int, place: int
    ) -> Tensor:
        """Dense attention of one call, and its errors if older steps had to do."""
        full = lowering.dense_attention(inputs)
        span = next((s for s in self.spans if s[0] <= step < s[1]), None)
        if span is None:
            return full
        start, stop = span
        if step == start:
            self.drop(place)
        begun = {step - (step - start) % every for every in self.every}
        for past in sorted(begun - {step}):
            anchor = self.anchors[place, past]
            sparse = lowering.sparse_attention(inputs, anchor.index)
            self.residual[place, step, past] = relative(sparse + anchor.residual, full)
            self.output[place, step, past] = relative(anchor.output, full)
        self.drop(place, keep=begun)
        if step in begun and step + 1 < stop:
            sparse = lowering.sparse_attention(inputs, index)
            self.anchors[place, step] = Anchor(full.clone(), full - sparse, index)
            share = density(index, inputs.mask, **sizes_of(inputs))
            self.cells.setdefault(place, []).append(float(share.mean()))
        return full

    def drop(self, place: int, keep: Sequence[int] | set[int] = ()) -> None:
        """Forget the anchors of an attention that no later step asks for."""
        for key in [k for k in self.anchors if k[0] == place and k[1] not in keep]:
            del self.anchors[key]


def sizes_of(inputs: AttentionInputs) -> dict[str, int]:
    """What counting cells is told."""
    batch, _, num_queries, _ = inputs.query.shape
    return {"batch": batch, "num_queries": num_queries, "num_keys": inputs.key.shape[2]}


def relative(guess: Tensor, true: Tensor) -> float:
    """The squared norm of a difference by that of the truth."""
    wide = torch.float32 if true.dtype != torch.float64 else torch.float64
    true = true.to(wide)
    return float((guess.to(wide) - true).square().sum() / true.square().sum().clamp(min=1e-30))
