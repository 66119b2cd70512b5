"""What the offline search measures: errors and recall against fp64, work, time and memory."""

from __future__ import annotations

import time

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import mpass
from mpass.calibration.instrument import AttentionOperands, Instrument, attend_dense, estimate_heads
from mpass.calibration.kernel_cost import count_work, read_clock
from mpass.calibration.measure import measure_layer
from mpass.calibration.probe import Probe, as_input
from mpass.calibration.sensitivity import disturbed_inputs, measure_slopes
from mpass.calibration.settings import Settings
from mpass.calibration.state import State
from mpass.evaluate.samples import Sample
from mpass.lowering.reference.attention import computed_mask, repeat_kv
from tests.helpers.calibration_cases import CANDIDATES, ToyLanguageModel, inputs, operands

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.mark.parametrize("offset", [0, 128, 100])
@pytest.mark.parametrize("rows", [None, [3, 70, 71, 365]])
def test_measures_are_those_of_exact_attention(offset, rows):
    given = operands(offset=offset)
    candidates = (mpass.Dense(), *CANDIDATES, mpass.VerticalSlash(100, 100))
    measured = measure_layer(given, candidates, max_query_blocks=99, rows=rows)
    length = given.query.shape[2]
    key, value = (repeat_kv(t, 4).double() for t in (given.key, given.value))
    scores = given.query.double() @ key.mT * given.scale
    positions = torch.arange(length)[:, None] + offset
    exact = scores.masked_fill(torch.arange(500) > positions, -torch.inf).softmax(-1)
    looked_at = list(range(length)) if rows is None else rows
    for number, candidate in enumerate(candidates):
        index = estimate_heads(given, [candidate] * 4)
        cells = computed_mask(index, given.mask, batch=1, num_queries=length, num_keys=500)
        kept = exact * cells
        recall = kept.sum(-1)
        error = ((kept @ value) / recall[..., None] - exact @ value).square().sum(-1)
        assert torch.allclose(measured.recall[number], recall[0, :, looked_at].mean(-1), atol=1e-5)
        expected = error[0, :, looked_at].mean(-1)
        assert torch.allclose(measured.error[number], expected, atol=1e-6, rtol=1e-3)
    assert measured.error[0].max() < 1e-10


@pytest.mark.parametrize("candidate", CANDIDATES, ids=str)
def test_work_covers_every_computed_cell(candidate):
    given = operands()
    index = estimate_heads(given, [candidate] * 4)
    tiles, columns = count_work(index, given)
    cells = computed_mask(index, given.mask, batch=1, num_queries=500, num_keys=500)
    assert ((tiles + columns) * 64 * 64 >= cells.sum((0, 2, 3))).all()
    dense, none = count_work(estimate_heads(given, [mpass.Dense()] * 4), given)
    assert dense.tolist() == [8 * 9 / 2] * 4
    assert none.tolist() == [0] * 4
    assert (tiles <= dense).all()


def test_the_instrument_sees_every_layer_and_changes_nothing():
    model = ToyLanguageModel(3).eval()
    tokens = torch.randint(0, 50, (1, 300))
    seen: list[int] = []

    def attend(given: AttentionOperands) -> Tensor:
        seen.append(given.layer)
        assert given.query.shape == (1, 4, 300, 8)
        assert given.key.shape == (1, 2, 300, 8)
        return attend_dense(given)

    instrument = Instrument(model)
    instrument.attend = attend
    with torch.no_grad():
        assert torch.allclose(instrument(tokens), model(tokens), atol=1e-5)
    assert seen == instrument.layers == [0, 1, 2]


def test_one_thread_is_timed_by_its_own_work(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    start = read_clock(torch.device("cpu"))
    time.sleep(0.2)
    assert read_clock(torch.device("cpu")) - start < 0.1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    start = read_clock(torch.device("cpu"))
    time.sleep(0.2)
    assert read_clock(torch.device("cpu")) - start >= 0.2


def test_memory_of_the_measures_grows_with_the_length_not_its_square():
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(value, Tensor):
                    self.elements = max(self.elements, value.numel())
            return out

    peaks = []
    for length in (2048, 4096):
        with Largest() as seen:
            measure_layer(operands(length), CANDIDATES, max_query_blocks=2)
        peaks.append(seen.elements)
    assert peaks[1] <= 2.1 * peaks[0]
    assert peaks[1] < 4096 * 4096


def test_only_short_prompts_are_run_once_per_layer():
    text, short = inputs(1, 600)
    long = Sample(torch.zeros(1, 1200, dtype=torch.int64), ("x",), ((1196, 1200),), 1196)
    items = [as_input(value) for value in (text, long, short)]
    for limit, lengths in ((500, [400]), (1200, [1200, 400]), (300, [400])):
        settings = Settings(sensitivity_length=limit)
        picked = disturbed_inputs(items, "retrieval", settings)
        assert [item.length for item in picked] == lengths
        (cut,) = disturbed_inputs(items, "text", settings)
        assert cut.length == min(600, limit)


def test_a_layer_that_nothing_reads_has_no_slope():
    model = ToyLanguageModel(3).eval()
    with torch.no_grad():
        model.decoder.layers[1].out.weight.zero_()
        model.decoder.layers[1].out.bias.zero_()
    items = [as_input(value) for value in inputs(1)]
    settings = Settings(sensitivity_length=300)
    kept = State(None, "")
    slopes = measure_slopes(Probe(model), items, [0, 1, 2], settings, kept, lambda *_: None)
    assert set(slopes) == {"text", "retrieval"}
    for slope in slopes.values():
        assert slope[1] < 1e-9
        assert slope[0] > 1e-7
        assert slope[2] > 1e-7
