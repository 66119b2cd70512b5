"""Single queries and output errors: what a profile says of them, against brute force in fp64."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mpass
from mpass.inspection.looks import BINS, MOST_KEYS, MOST_QUERIES, choose_queries, measure_looks
from mpass.inspection.profiling import profile
from mpass.inspection.recall import LEVELS, measure_recall
from mpass.lowering.reference import attention as reference
from tests.helpers.toys import Decoder
from tests.inspection.test_profiling import CASES, brute_force, make_operands

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def with_values(operands):
    batch, kv_heads, num_keys, _ = operands.key.shape
    return dataclasses.replace(operands, value=torch.randn(batch, kv_heads, num_keys, 8))


def exact_weights(operands):
    """fp64 attention of all queries [B, H, Nq, Nk], and which cells are computed."""
    query, key, mask = operands.query.double(), operands.key.double(), operands.mask
    scores = query @ reference.repeat_kv(key, query.shape[1]).mT * operands.scale
    if operands.softcap:
        scores = operands.softcap * torch.tanh(scores / operands.softcap)
    positions = torch.arange(query.shape[2]) + mask.query_offset
    allowed = reference.allowed_cells(mask, positions, key.shape[2]).expand_as(scores)
    sinks = operands.sinks.double() if operands.sinks is not None else None
    sizes = {"batch": query.shape[0], "num_queries": query.shape[2], "num_keys": key.shape[2]}
    computed = reference.computed_mask(operands.index, mask, **sizes)
    every = reference.masked_softmax(scores, allowed, sinks)
    return every, reference.masked_softmax(scores, allowed & computed, sinks), computed


@pytest.mark.parametrize("name", CASES)
def test_the_output_error_is_that_of_attention_over_the_selected_keys(name):
    operands = with_values(make_operands(**CASES[name]))
    every, chosen, _ = exact_weights(operands)
    value = reference.repeat_kv(operands.value.double(), 4)
    _, _, _, count = brute_force(operands)
    exact, found = every @ value, chosen @ value
    if operands.mask.key_mask is not None:
        rows = operands.mask.key_mask[:, None, :, None]
        exact, found = exact * rows, found * rows
    wanted = ((found - exact).square().sum((0, 2, 3)) / exact.square().sum((0, 2, 3))).sqrt()
    measured = measure_recall(operands).output_error
    assert torch.allclose(measured, wanted, atol=1e-5)
    assert count > 0 and (name == "short" or (wanted > 0.01).any())


def test_without_values_there_is_no_output_error():
    assert measure_recall(make_operands()).output_error is None


@pytest.mark.parametrize("name", CASES)
def test_looks_are_the_exact_weights_and_the_keys_taken(name):
    operands = make_operands(**CASES[name])
    num_queries, offset = operands.query.shape[2], operands.mask.query_offset
    queries = choose_queries(num_queries, offset)
    assert len(queries) == min(MOST_QUERIES, num_queries)
    assert queries[-1] == num_queries + offset - 1
    looks = measure_looks(operands, queries)
    every, _, computed = exact_weights(operands)
    for number, position in enumerate(queries):
        weights, taken = every[0, :, position - offset], computed[0, :, position - offset]
        heaviest = weights.topk(min(MOST_KEYS, weights.shape[-1]), -1).values
        assert torch.allclose(looks.weights[:, number].double(), heaviest, atol=1e-5)
        keys = looks.keys[:, number]
        shown = keys.clamp(min=0)
        assert torch.equal(looks.taken[:, number], taken.gather(-1, shown) & (keys >= 0))
        assert torch.equal(looks.count[:, number], taken.sum(-1))
        assert torch.allclose(looks.kept[:, number], (weights * taken).sum(-1), atol=1e-5)
        assert bool((looks.strip_taken[:, number] <= LEVELS).all())
        cells = torch.arange(taken.shape[-1]) * BINS // taken.shape[-1]
        touched = torch.zeros(4, BINS).index_add_(1, cells, taken.float()) > 0
        assert torch.equal(looks.strip_taken[:, number] > 0, touched)


def test_wanted_queries_are_looked_from_and_others_left_out():
    assert choose_queries(100, 50, (149, 60, 60, 3, 150)) == (60, 149)


def test_a_profile_says_of_each_layer_what_dense_took_what_is_lost_and_where_it_comes_from():
    torch.manual_seed(0)
    model = Decoder(depth=2).eval()
    options = {"min_seq_len": 64, "dense_above": 2.0, "pattern": "a_shape(4, 64)"}
    with torch.no_grad():
        done = profile(
            model,
            torch.randn(1, 256, 32),
            options=options,
            tokens=["a"] * 256,
            queries=[200],
            about={"model": "toy", "prompt": "noise"},
        )
    layer = done.layers[0]
    assert layer.dense_seconds > 0 and layer.looks.queries == (200,)
    head = layer.heads[0]
    assert head.lost_mass == pytest.approx(1 - head.recall) and head.output_error > 0.01
    known = dict(done.explanation.provenance)
    assert (known["model"], known["prompt"], known["class"]) == ("toy", "noise", "Decoder")
    assert "pattern a_shape(4, 64)" in known["options"] and known["dtype"] == "float32"
    assert mpass.__version__ in known["versions"] and "UTC" in known["date"]
    data = done.as_dict()
    assert data["provenance"]["processor"] and data["layers"][0]["heads"][0]["lost_mass"] > 0
    assert "error" in str(done) and "dense ms" in str(done)


def test_the_profiler_writes_nothing_of_its_own(capfd):
    with torch.no_grad():
        profile(Decoder(depth=1).eval(), torch.randn(1, 64, 32), options={"min_seq_len": 32})
    assert "profiler_" not in capfd.readouterr().err
