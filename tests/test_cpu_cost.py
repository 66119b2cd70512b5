"""The cost model: closed forms against counts, and constants that are timed once."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from mpass.lowering.cpu import cost
from mpass.lowering.cpu.cost import CostConstants

from tests.cpu_cases import needs_kernels

CONSTANTS = CostConstants(
    dense_call=2e-5, dense_cell=3e-9, sparse_call=6e-5, tile=1.5e-5, pack=1e-5
)
LAYER = {"heads": 8, "kv_heads": 2}


def test_prediction_counts_cells_and_tiles() -> None:
    found = cost.predict(CONSTANTS, length=640, density=1.0, **LAYER)
    assert found.dense == pytest.approx(2e-5 + 8 * 640**2 / 2 * 3e-9)
    tiles = 10 * 11 / 2  # ten query blocks
    assert found.sparse == pytest.approx(6e-5 + 8 * tiles * 1.5e-5 + 2 * 10 * 1e-5)


@pytest.mark.parametrize("length", [1024, 8192, 65536])
def test_crossover_density_is_where_both_cost_the_same(length: int) -> None:
    density = cost.crossover_density(CONSTANTS, length=length, **LAYER)
    assert 0 < density < 1
    found = cost.predict(CONSTANTS, length=length, density=density, **LAYER)
    assert found.speedup == pytest.approx(1.0)
    assert cost.predict(CONSTANTS, length=length, density=density / 2, **LAYER).speedup > 1


def test_crossover_length_is_where_sparse_starts_to_pay() -> None:
    length = cost.crossover_length(CONSTANTS, density=0.3, **LAYER)
    assert 0 < length < math.inf
    before = cost.predict(CONSTANTS, length=int(length * 0.9), density=0.3, **LAYER)
    after = cost.predict(CONSTANTS, length=int(length * 1.1), density=0.3, **LAYER)
    assert before.speedup < 1 < after.speedup
    slow = CostConstants(2e-5, 3e-9, 6e-5, tile=1.0, pack=1e-5)
    assert cost.crossover_length(slow, density=0.3, **LAYER) == math.inf


@needs_kernels
def test_constants_are_timed_once_and_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    cost.machine_constants.cache_clear()
    first = cost.machine_constants(torch.float32, 64, 64)
    assert first.tile > 0
    assert first.dense_cell > 0
    cost.machine_constants.cache_clear()
    monkeypatch.setattr(cost, "measure_constants", lambda *_: pytest.fail("timed again"))
    assert cost.machine_constants(torch.float32, 64, 64) == first
    cost.machine_constants.cache_clear()
