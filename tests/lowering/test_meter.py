"""The meter: what it says is lost is what fp64 attention over the computed cells loses."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import mpass
from mpass.lowering import exact_rows as rows_looked_at
from mpass.lowering import meter
from mpass.lowering.exact_rows import exact_rows, kept_mass, sampled_rows
from mpass.lowering.index import AttentionMask, join_indexes
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.lowering.meter import ROWS
from mpass.lowering.reference import attention as reference
from tests.helpers.toys import Decoder, RecordingBackend
from tests.helpers.truth import dense_attention, random_attention


@pytest.fixture(autouse=True)
def many_rows(monkeypatch):
    """As many rows of short prompts as of long ones."""
    monkeypatch.setattr(rows_looked_at, "QUERIES_PER_ROW", 1)


PATTERNS = (
    mpass.VerticalSlash(8, 70),
    mpass.AShape(3, 90),
    mpass.BlockSparse(2),
    mpass.VerticalBlock(0.2, 0.9, 16, local_blocks=1, max_blocks=3),
)


def mixed_index(query, key, mask):
    """An index whose heads have the four PATTERNS, lists and diagonals among them."""
    order = [[2], [0], [3], [1]]
    parts = [
        type(PATTERNS[head]).estimate(
            EstimateInputs(query, key, mask, [head], 0.3), [PATTERNS[head]]
        )
        for (head,) in order
    ]
    return join_indexes(parts, order)


CASES = {
    "whole prompt": {},
    "chunk": {"num_queries": 150, "num_keys": 333},
    "window": {"window": 100},
    "padding": {"batch": 2, "padded": True},
    "softcap and sinks": {"softcap": 3.0, "sinks": True},
    "not causal": {"causal": False},
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_lost_mass_and_error_of_sampled_rows_are_those_of_fp64_attention(case):
    sizes = {"num_queries": 300} | {
        k: case[k] for k in ("num_queries", "num_keys", "batch") if k in case
    }
    query, key, value = random_attention(**sizes)
    query *= 3
    num_queries, num_keys = query.shape[2], key.shape[2]
    causal = case.get("causal", True)
    padding = None
    if case.get("padded"):
        padding = torch.arange(num_keys) >= torch.tensor([[0], [77]])
    offset = num_keys - num_queries if causal else 0
    mask = AttentionMask(causal, offset, case.get("window", 0), padding)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0]) if case.get("sinks") else None
    inputs = AttentionInputs(
        query, key, value, mask, 0.3, case.get("softcap", 0.0), sink_logits=sinks
    )
    index = mixed_index(query, key, mask)
    out = reference.sparse_attention(inputs, index)
    with_all = replace(inputs, query=query.double(), key=key.double(), value=value.double())

    cells = reference.computed_mask(
        index, mask, batch=len(query), num_queries=num_queries, num_keys=num_keys
    )
    positions = torch.arange(num_queries) + offset
    allowed = reference.allowed_cells(mask, positions, num_keys).expand_as(cells)
    scores = with_all.query @ with_all.key.repeat_interleave(2, 1).mT * 0.3
    if inputs.softcap:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    weights = reference.masked_softmax(scores, allowed, sinks)
    exact = weights @ with_all.value.repeat_interleave(2, 1)

    rows = torch.cat([part.rows for part in exact_rows(inputs, ROWS)])
    real = allowed.any(-1)[:, 0]
    if padding is not None:
        real = real & padding
    for part in exact_rows(inputs, ROWS):
        kept = kept_mass(part, inputs, index)
        truth = (weights * cells).sum(-1)[:, :, part.rows]
        assert torch.allclose(kept.double(), truth, atol=1e-5)
    meter.measure_call(inputs, index, out, 7, dense=False)
    meter.start_prompt(7)
    meter.measure_call(inputs, index, out, -7, dense=False)
    loss = meter.loss_of(7)

    counted = real[:, None, rows]
    lost = (weights * ~cells).sum(-1)[:, :, rows] * counted
    gap = (out.double() - exact)[:, :, rows].square().sum(-1) * counted
    square = exact[:, :, rows].square().sum(-1) * counted
    assert loss.rows == int(counted.sum()) > 40
    expected = (lost.sum((0, 2)) / counted.sum()).tolist()
    assert loss.lost == pytest.approx(expected, abs=1e-5)
    assert max(loss.lost) > 0.02
    assert loss.worst == pytest.approx(lost.amax((0, 2)).tolist(), abs=1e-5)
    root = (gap.sum((0, 2)) / square.sum((0, 2))).sqrt().tolist()
    assert loss.error == pytest.approx(root, abs=1e-4)


@pytest.mark.parametrize("num_queries", [1, 5, 63, 64, 65, 8192, 100_003])
def test_one_row_of_each_equal_part_is_looked_at_and_always_the_same(num_queries):
    count = min(64, num_queries)
    rows = sampled_rows(num_queries, 0, count, count, "cpu")
    parts = torch.cat([sampled_rows(num_queries, i, i + 1, count, "cpu") for i in range(count)])
    assert torch.equal(rows, parts)
    bounds = torch.arange(count + 1) * num_queries // count
    assert bool((rows >= bounds[:-1]).all()) and bool((rows < bounds[1:]).all())


def test_selecting_every_key_loses_nothing_and_a_dense_call_counts_as_one():
    query, key, value = random_attention(num_queries=200)
    inputs = AttentionInputs(query, key, value, AttentionMask(), 0.2)
    index = mpass.BlockSparse.estimate(
        EstimateInputs(query, key, AttentionMask(), range(4), 0.2), [mpass.BlockSparse(9)] * 4
    )
    out = dense_attention(query, key, value, torch.ones(1, 4, 200, 200).tril() > 0, 0.2).float()
    meter.measure_call(inputs, index, out, 8, dense=False)
    loss = meter.loss_of(8)
    assert max(loss.lost) < 1e-5 and max(loss.error) < 1e-5
    meter.measure_call(inputs, index, out, 9, dense=True)
    assert (meter.loss_of(9).lost, meter.loss_of(9).dense) == ((), 1)


def test_chunks_of_a_prompt_are_added_up_and_a_new_prompt_starts_anew():
    query, key, value = random_attention(num_queries=512)
    pattern = mpass.AShape(1, 64)

    def run(start, stop):
        mask = AttentionMask(query_offset=start)
        part = (query[:, :, start:stop], key[:, :, :stop])
        index = type(pattern).estimate(EstimateInputs(*part, mask, range(4), 0.2), [pattern] * 4)
        inputs = AttentionInputs(*part, value[:, :, :stop], mask, 0.2)
        out = reference.sparse_attention(inputs, index)
        meter.measure_call(inputs, index, out, 11, dense=False)

    run(0, 256)
    first = meter.loss_of(11)
    run(256, 512)
    both = meter.loss_of(11)
    assert (first.rows, both.rows, both.calls) == (ROWS, 2 * ROWS, 2)
    assert both.lost[0] > first.lost[0] > 0
    run(0, 256)
    assert meter.loss_of(11) == first


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_a_compiled_model_reports_what_its_last_prompt_lost(inner):
    model, options = Decoder(depth=2).eval(), {"pattern": mpass.AShape(1, 64), "min_seq_len": 128}
    options |= {"dense_above": 2.0, "inner_backend": inner}
    x = torch.randn(1, 300, 32)
    plain = torch.compile(model, backend="minference", options=options)(x)
    assert mpass.last_report().losses == ()
    torch._dynamo.reset()
    measuring = torch.compile(model, backend="minference", options=options | {"measure": True})
    assert torch.equal(measuring(x), plain)
    report = mpass.last_report()
    assert [len(loss.lost) for loss in report.losses] == [4, 4]
    assert all(0.02 < lost < 1 for loss in report.losses for lost in loss.lost)
    assert "the last prompt lost" in report.summary()
    assert "heads that lost most: layer" in str(report)
    again = report.losses
    measuring(x)
    assert mpass.last_report().losses == again
    measuring(x * 0)
    assert mpass.last_report().losses != again


@pytest.mark.usefixtures("fresh_dynamo")
@torch.no_grad()
def test_nothing_is_in_the_graph_that_nobody_measures():
    backend = RecordingBackend(pattern=mpass.AShape(1, 64))
    torch.compile(Decoder(depth=1).eval(), backend=backend)(torch.randn(1, 300, 32))
    (call,) = [n for n in backend.after[0].graph.nodes if "sparse_attention" in str(n.target)]
    assert len(call.args) == 21


def test_measuring_can_be_paused():
    query, key, value = random_attention(num_queries=128)
    inputs = AttentionInputs(query, key, value, AttentionMask(), 0.2)
    index = mixed_index(query, key, AttentionMask())
    with meter.paused():
        meter.measure_call(inputs, index, value, 12, dense=False)
    assert meter.loss_of(12) is None


def test_measure_is_true_or_false():
    with pytest.raises(mpass.errors.OptionValueError, match="measure"):
        mpass.compile(torch.nn.Linear(1, 1), measure="yes")
