"""Which products of linear layers a processor is said to be fastest at."""

from __future__ import annotations

import pytest
import torch

from mpass.lowering.cpu import cost_constants, linear_rates
from mpass.lowering.cpu.cost_model import LinearConstants
from mpass.lowering.cpu.linear_half import half_linear_reason
from tests.helpers.cpu_cases import needs_kernels

MACHINES = {
    "pairs are fastest": (LinearConstants(1.0, 2.0), False, False),
    "tiles are fastest, with half precision": (LinearConstants(0.2, 2.0, 1.4), False, False),
    "fp32 is fastest": (LinearConstants(2.0, 1.0), True, False),
    "half is fastest": (LinearConstants(2.0, 1.0, 0.7), True, True),
    "half is hardly faster": (LinearConstants(2.0, 1.0, 0.95), True, False),
}


@pytest.fixture(autouse=True)
def nothing_known():
    linear_rates.linear_constants.cache_clear()
    yield
    linear_rates.linear_constants.cache_clear()


@pytest.mark.parametrize(("constants", "fp32", "half"), MACHINES.values(), ids=MACHINES)
def test_half_precision_is_taken_unasked_only_where_it_clearly_pays(
    constants, fp32, half, monkeypatch, tmp_path
):
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_rates, "measure_linear", lambda: constants)
    assert linear_rates.fp32_linear_pays(torch.bfloat16) is fp32
    assert linear_rates.half_linear_pays(torch.bfloat16) is half
    monkeypatch.setattr(linear_rates, "measure_linear", lambda: pytest.fail("timed again"))
    linear_rates.linear_constants.cache_clear()
    assert linear_rates.half_linear_pays(torch.bfloat16) is half


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64], ids=str)
def test_other_dtypes_are_left_alone_and_nothing_is_timed(dtype, monkeypatch):
    monkeypatch.setattr(linear_rates, "measure_linear", lambda: pytest.fail("timed"))
    assert not linear_rates.fp32_linear_pays(dtype)
    assert not linear_rates.half_linear_pays(dtype)


@needs_kernels
def test_what_is_timed_is_what_this_machine_can_do(monkeypatch, tmp_path):
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    monkeypatch.setattr(linear_rates, "LINEAR_SIZE", (128, 64, 64))
    monkeypatch.setattr(cost_constants, "SHORTEST_TURN", 1e-4)
    found = linear_rates.linear_constants(torch.bfloat16)
    assert found is not None and found.bf16 > 0 and found.fp32 > 0
    assert (found.half > 0) is (half_linear_reason(torch.bfloat16) == "")
