"""The tables of benchmarks/quality: predictions by other texts, and losses divided among layers."""

from __future__ import annotations

import pytest
import torch

from benchmarks.quality.layers import PROMISES
from benchmarks.quality.layers_table import curves_of, divide, totals
from benchmarks.quality.parts import cells
from benchmarks.quality.signals_table import draw, predictions
from mpass.lowering.readback import Readback
from mpass.lowering.recorder import AttentionCall, Log


def test_a_text_is_predicted_by_the_others_alone():
    lines = [
        {"text": text, "length": 8, "setting": "x", "divergence": d, "lost_mass": m}
        for text, d, m in (("a", 0.02, 0.1), ("b", 0.1, 0.2), ("c", 0.4, 0.2), ("a", 0.9, 0.5))
    ]
    assert predictions(lines, "lost_mass") == pytest.approx(
        [0.1, 0.2 * (0.2 * 1.8 * 2) ** (1 / 3), 0.2 * (0.2 * 1.8 * 0.5) ** (1 / 3), 0.5]
    )
    picture = draw(lines, "lost_mass", [0.1, 0.2, 0.3, 0.4])
    assert picture.count("<circle") == 4 + 3  # three in the legend


def test_layers_that_matter_less_lose_more_at_the_same_divergence():
    steps = len(PROMISES)
    curve = {"density": [1 - i / steps for i in range(steps)], "lost": list(PROMISES)}
    lines = [{"curves": [curve], "divergence": d} for d in (0.1, 0.001)]
    curves = curves_of(lines, "lost")
    _, most = totals(curves, [20, 20])
    same, _ = totals(curves, [20, 20])
    chosen = divide(curves, most)
    density, divergence = totals(curves, chosen)
    assert chosen[0] < 20 < chosen[1]
    assert density < same and divergence <= most
    assert divide([curves[0]] * 2, totals(curves[:1] * 2, [20, 20])[1])[0] in (19, 20)


def test_chunks_that_are_not_recorded_were_dense():
    assert cells(Log(), 2) == 1.0
    density = Readback(torch.tensor([[1.0, 1.0], [0.25, 0.75]], dtype=torch.float64))
    call = AttentionCall(0, "cpu", density, 4, 8, 0)
    assert cells(Log(calls=[call]), 1) == 1 - 0.5 * 4 * 6 / 32
