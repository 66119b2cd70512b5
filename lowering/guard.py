"""Whether an index loses more than a call may: some rows are held against exact attention.

An estimate may be wrong of a whole head, as where each query looks for one key of its own whose
neighbours hide it. So where a loss is promised (`options={"max_loss": ...}`), the softmax mass that
an index leaves out is taken from some query rows exactly, before anything is computed with it.
"""

from __future__ import annotations

import torch

from mpass.lowering.dispatch import device_lowering
from mpass.lowering.exact_rows import exact_rows, kept_mass
from mpass.lowering.index import SparseIndex
from mpass.lowering.inputs import AttentionInputs

GUARD_ROWS = 16
"""Query rows that are looked at: a head that is wrong is wrong in most of them. A quarter of the
meter's, at a quarter of its cost."""


def lost_too_much(inputs: AttentionInputs, index: SparseIndex, most_lost: float) -> str:
    """Why a call must be dense, in words, or "": a head that loses more than `most_lost`, a share.

    That is the mean over rows that count. Where the host must not wait for the device (GPUs)
    nothing is looked at.
    """
    if most_lost >= 1.0 or not device_lowering(inputs.query.device).decides_by_cost:
        return ""
    lost = torch.zeros(inputs.query.shape[1], dtype=torch.float64)
    rows = 0.0
    for exact in exact_rows(inputs, GUARD_ROWS, outputs=False):
        counted = exact.counted[:, None]
        left_out = exact.mass.sum(-1) - kept_mass(exact, inputs, index)
        lost += (left_out * counted).sum((0, 2), dtype=torch.float64)
        rows += float(counted.sum())
    worst = float(lost.max()) / max(1.0, rows) if len(lost) else 0.0
    if not worst > most_lost:
        return ""
    return f"{worst:.0%} of a head's attention would be lost, {most_lost:.0%} may be"
