"""The benchmark of searched configs: rivals at equal cost, and what its tables say."""

from __future__ import annotations

import pytest
import torch

import mpass
from benchmarks.calibration import rivals
from benchmarks.calibration.report import compare, equal_quality, print_needles, quality_rows
from benchmarks.calibration.work import Plan
from mpass.calibration.instrument import estimate_heads
from mpass.calibration.kernel_cost import KernelCost, count_work
from mpass.patterns.base import registered_patterns
from mpass.patterns.tri_shape import TriShape
from tests.helpers.calibration_cases import operands

PLAN = Plan("", "bf16", "fp32", 64, (0.25,), (0.22,), ("alice",), ("one", "two"), "code", 1)


def line(text: str, name: str, parts: list[float], divergence: float, seconds: float) -> dict:
    loss = sum(parts) / len(parts)
    values = {"parts": parts, "loss": loss, "divergence": divergence, "seconds": seconds}
    return {"text": text, "name": name, **values}


LINES = [
    line(text, name, parts, divergence, seconds)
    for text, shift in (("one", 0.0), ("two", 1.0))
    for name, parts, divergence, seconds in (
        ("dense", [2.0 + shift, 4.0 + shift], 0.0, 10.0),
        ("searched @ 0.22", [2.1 + shift, 4.1 + shift], 0.02, 2.2),
        ("searched @ 0.25", [2.1 + shift, 4.0 + shift], 0.01, 2.5),
        ("union @ 0.25", [2.3 + shift, 4.1 + shift], 0.02, 2.6),
    )
] + [line("one", "a_shape @ 0.25", [9.0, 9.0], 3.0, 2.5)]


TURNED = [
    name
    for name, make in rivals.knobs(8192).items()
    if "knobs" in vars(type(make(0.5)))  # a pattern without a knob is compared as it is
]


def test_every_registered_pattern_has_a_rival():
    made = {make(0.5).name for make in rivals.knobs(8192).values()}
    assert made == set(registered_patterns()) - {"dense"}


@pytest.mark.parametrize("name", TURNED)
def test_a_rivals_knob_is_allowed_over_its_whole_range(name):
    make = rivals.knobs(8192)[name]
    assert make(0.0) != make(1.0)


@pytest.mark.parametrize("budget", [0.4, 0.7])
def test_a_rival_is_the_dearest_one_within_the_budget(budget, monkeypatch):
    monkeypatch.setattr(rivals, "read_clock", lambda device: 0.0)
    torch.manual_seed(0)
    layers = [operands(4096), operands(4096)]
    dense, _ = count_work(estimate_heads(layers[0], [mpass.Dense()] * 4), layers[0])
    kernel = KernelCost(1.0, 1.0, float(dense.sum()))
    make = rivals.knobs(4096)["tri_shape"]
    pattern, share = rivals.tune(make, budget, layers, kernel)
    assert isinstance(pattern, TriShape)
    wider = TriShape(window_size=pattern.window_size + 64)
    assert share <= budget
    assert share == rivals.share_of(pattern, layers, kernel)
    assert share >= rivals.CLOSE * budget or rivals.share_of(wider, layers, kernel) > budget


def test_a_rival_that_is_never_cheap_enough_is_left_out(monkeypatch):
    monkeypatch.setattr(rivals, "read_clock", lambda device: 0.0)
    kernel = KernelCost(1.0, 1.0, 1e-3)
    assert rivals.tune(lambda x: mpass.BlockSparse(8), 0.5, [operands()], kernel)[0] is None


def test_contestants_are_compared_stretch_by_stretch():
    table = {row["name"]: row for row in compare(quality_rows(LINES), PLAN)}
    assert list(table) == ["searched @ 0.22", "searched @ 0.25", "union @ 0.25"]
    union = table["union @ 0.25"]
    assert union["increase"] == pytest.approx(0.2)
    assert union["share"] == pytest.approx(0.26)
    # 0.2 and 0.1 more than searched in the two stretches of either text.
    assert union["more"] == pytest.approx(0.15)
    assert union["more_error"] == pytest.approx((4 * 0.05**2 / 3) ** 0.5 / 2)
    assert table["searched @ 0.25"]["more"] == 0.0


def test_equal_quality_takes_the_fastest_that_is_no_worse_in_either_figure():
    (found,) = equal_quality(quality_rows(LINES), PLAN.texts)
    assert (found["rival"], found["searched"]) == ("union @ 0.25", "searched @ 0.22")
    assert found["searched_seconds"] == pytest.approx(2.2)


def test_retention_counts_prompts_that_dense_answers(capsys):
    found = [
        {"task": "passkey", "length": 64, "seed": seed, "name": name, "score": score}
        for seed, name, score in (
            (0, "dense", 1.0),
            (1, "dense", 0.0),
            (0, "union @ 0.25", 0.0),
            (1, "union @ 0.25", 1.0),
        )
    ]
    print_needles(found)
    assert "| dense | 1 of 2 |\n| union @ 0.25 | 0 of 1 |" in capsys.readouterr().out
