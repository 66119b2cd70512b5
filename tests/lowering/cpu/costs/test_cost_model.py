"""The cost model: closed forms against counts."""

from __future__ import annotations

import dataclasses

import pytest

from mpass.lowering.cpu import cost_model as cost
from mpass.lowering.cpu.cost_model import CostConstants, EstimatorConstants

CONSTANTS = CostConstants(
    dense_call=2e-5,
    dense_cell=3e-9,
    sparse_call=6e-5,
    row=1e-6,
    tile=1.5e-5,
    column=2e-5,
    pack=1e-5,
)
LAYER = {"heads": 8, "kv_heads": 2}


@pytest.mark.parametrize("length", [320, 640])
def test_prediction_counts_cells_and_tiles(length: int) -> None:
    found = cost.predict(CONSTANTS, length=length, density=1.0, **LAYER)
    # Torch masks what it computed of the last 512 keys after the diagonal: half of them on average.
    beyond = length * min(length, 512) / 2
    assert found.dense == pytest.approx(2e-5 + 8 * (length**2 / 2 + beyond) * 3e-9)
    blocks = length // 64
    tiles = sum(range(1, blocks + 1))
    rows = 8 * (blocks * 1e-6 + tiles * 1.5e-5)
    assert found.sparse == pytest.approx(6e-5 + rows + 2 * blocks * 1e-5)


def test_prediction_counts_columns_as_tiles_of_64() -> None:
    sizes = {"length": 640, "density": 0.5, **LAYER}
    more = cost.predict(CONSTANTS, columns=128, **sizes).sparse
    assert more - cost.predict(CONSTANTS, **sizes).sparse == pytest.approx(8 * 10 * 2 * 2e-5)


@pytest.mark.parametrize("length", [4096, 8192, 65536])
def test_crossover_density_is_where_both_cost_the_same(length: int) -> None:
    density = cost.crossover_density(CONSTANTS, length=length, **LAYER)
    assert 0 < density < 1
    found = cost.predict(CONSTANTS, length=length, density=density, **LAYER)
    assert found.speedup == pytest.approx(1.0)
    assert cost.predict(CONSTANTS, length=length, density=density / 2, **LAYER).speedup > 1


def test_crossover_density_stays_between_none_and_all() -> None:
    slow = dataclasses.replace(CONSTANTS, pack=1.0)
    assert cost.crossover_density(slow, length=4096, **LAYER) == 0
    fast = dataclasses.replace(CONSTANTS, tile=1e-7)
    assert cost.crossover_density(fast, length=4096, **LAYER) == 1


@pytest.mark.parametrize(
    "truth", [EstimatorConstants(1e-4, 2e-7, 3e-11), EstimatorConstants(0.0, 1e-7, 0.0)]
)
def test_estimator_fit_finds_the_parabola(truth: EstimatorConstants) -> None:
    lengths = (64, 512, 2048)
    found = EstimatorConstants.fit(lengths, [truth.seconds(n, 4) for n in lengths], 4)
    for length in (64, 2048, 32768):
        assert found.seconds(length, 8) == pytest.approx(truth.seconds(length, 8))


def test_estimator_fit_has_no_negative_terms() -> None:
    found = EstimatorConstants.fit((64, 512, 2048), (1e-3, 2e-3, 1.5e-3), 4)
    assert min(dataclasses.astuple(found)) >= 0
