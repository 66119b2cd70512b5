"""mpass.profile: recall and densities against brute force, advice, maps, times."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
from types import SimpleNamespace

import pytest
import torch

import mpass
from mpass.functional import estimate_index
from mpass.inspection.advice import advise
from mpass.inspection.explanation import Explanation
from mpass.inspection.page.build import tiles
from mpass.inspection.profiling import Profile, profile, time_ops
from mpass.inspection.recall import LEVELS, measure_recall
from mpass.inspection.results import HeadProfile, LayerProfile, Shares
from mpass.lowering.density import density as count_density
from mpass.lowering.index import BLOCK, AttentionMask, join_indexes
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.recorder import Operands, record
from mpass.lowering.reference import attention as reference
from mpass.patterns.base import registered_patterns
from mpass.patterns.block_sparse import BlockSparse
from tests.helpers.rotation import part_of_today
from tests.helpers.toys import Decoder

OPTIONS = {"min_seq_len": 128, "dense_above": 2.0}


pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def make_operands(
    *, batch=1, queries=300, keys=300, mask=None, softcap=0.0, sinks=False, scale=0.5, patterns=None
):
    """Four heads over two kv heads: A-shape and lists."""
    query = torch.randn(batch, 4, queries, 16) * 2
    key = torch.randn(batch, 2, keys, 16) * 2
    mask = mask or AttentionMask(query_offset=keys - queries)
    shape = mpass.AShape(4, 40)
    parts = [
        mpass.AShape.estimate(EstimateInputs(query, key, mask, [0, 1], scale), [shape] * 2),
        reference_lists(query, key, mask, [2, 3]),
    ]
    index = join_indexes(parts, [[0, 1], [2, 3]])
    return Operands(query, key, index, mask, scale, softcap, torch.randn(4) if sinks else None)


def reference_lists(query, key, mask, heads):
    from mpass.lowering.reference.block_sparse import BlockSparseRule, block_sparse_index

    rules = [BlockSparseRule(2)] * len(heads)
    return block_sparse_index(EstimateInputs(query, key, mask, heads, 1.0), rules)


def brute_force(operands):
    """fp64: recall [H], and the attention [B, H, Nq, Nk] of queries that count, lost and whole."""
    query, key, mask = operands.query.double(), operands.key.double(), operands.mask
    batch, heads, num_queries, _ = query.shape
    scores = query @ reference.repeat_kv(key, heads).mT * operands.scale
    if operands.softcap:
        scores = operands.softcap * torch.tanh(scores / operands.softcap)
    positions = torch.arange(num_queries) + mask.query_offset
    allowed = reference.allowed_cells(mask, positions, key.shape[2]).expand_as(scores)
    sinks = operands.sinks.double() if operands.sinks is not None else None
    weights = reference.masked_softmax(scores, allowed, sinks)
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": key.shape[2]}
    computed = reference.computed_mask(operands.index, mask, **sizes)
    counts = allowed.any(-1)
    if mask.key_mask is not None:
        counts = counts & mask.key_mask[:, None, positions]
    share = (weights * computed).sum(-1) / weights.sum(-1).clamp(min=1e-300)
    recall = (share * counts).sum((0, 2)) / counts[:, 0].sum()
    weights = weights * counts[..., None]
    return recall, weights, weights * ~computed, counts[:, 0].sum()


PADDED = torch.ones(2, 300, dtype=torch.bool)
PADDED[1, :77] = False

CASES = {
    "square": {},
    "batch": {"batch": 2},
    "ragged": {"queries": 257, "keys": 257},
    "chunk": {"queries": 150, "keys": 333},
    "window": {"mask": AttentionMask(window=90)},
    "padding": {"batch": 2, "mask": AttentionMask(key_mask=PADDED)},
    "softcap": {"softcap": 3.0},
    "sinks": {"sinks": True},
    "short": {"queries": 5, "keys": 5},
}


@pytest.mark.parametrize("name", CASES)
def test_recall_is_that_of_brute_force(name):
    operands = make_operands(**CASES[name])
    measured = measure_recall(operands)
    recall, _, lost, count = brute_force(operands)
    assert measured.all_queries
    assert torch.allclose(measured.recall, recall, atol=1e-5)
    if name != "short":
        assert (recall < 0.999).any()
    blocks = -(-operands.key.shape[2] // BLOCK)
    padded = torch.nn.functional.pad(lost, (0, blocks * BLOCK - lost.shape[-1]))
    by_block = padded.unflatten(-1, (blocks, BLOCK)).sum((0, 2, 4)) / count
    assert torch.allclose(measured.lost_by_block, by_block, atol=1e-5)
    assert torch.allclose(measured.lost_by_distance.sum(-1), by_block.sum(-1), atol=1e-5)


def test_maps_show_the_selection_and_the_exact_attention():
    operands = make_operands(queries=256, keys=256)
    measured = measure_recall(operands)
    _, weights, _, _ = brute_force(operands)
    tiles = weights.unflatten(3, (4, BLOCK)).unflatten(2, (4, BLOCK)).sum((3, 5))[0] / BLOCK
    levels = (1 + torch.log10(tiles.clamp(min=1e-12)) / 4) * LEVELS
    assert (measured.exact.double() - levels.clamp(0, LEVELS)).abs().max() <= 0.51
    sizes = {"batch": 1, "num_queries": 256, "num_keys": 256}
    computed = reference.computed_mask(operands.index, operands.mask, **sizes)
    touched = computed.unflatten(3, (4, BLOCK)).unflatten(2, (4, BLOCK)).any(5).any(3)[0]
    assert torch.equal(measured.computed > 0, touched)


def test_worst_place_holds_most_of_the_loss():
    operands = make_operands(queries=256, keys=256)
    measured = measure_recall(operands)
    _, _, lost, _ = brute_force(operands)
    tiles = lost.unflatten(3, (4, BLOCK)).unflatten(2, (4, BLOCK)).sum((3, 5))[0] / BLOCK
    for head, (query_block, key_block, mass) in enumerate(measured.worst):
        assert mass == pytest.approx(float(tiles[head].max()), abs=1e-5)
        assert mass == pytest.approx(float(tiles[head, query_block, key_block]), abs=1e-5)


def test_sampled_queries_are_the_named_blocks():
    operands = make_operands(queries=640, keys=640)
    measured = measure_recall(operands, max_query_blocks=3)
    assert (measured.query_blocks, measured.all_queries) == ([2, 5, 9], False)
    _, weights, lost, _ = brute_force(operands)
    rows = torch.cat([torch.arange(b * BLOCK, (b + 1) * BLOCK) for b in (2, 5, 9)])
    expected = 1 - (lost.sum(-1) / weights.sum(-1))[0][:, rows].mean(-1)
    assert torch.allclose(measured.recall, expected, atol=1e-5)
    assert measured.exact.shape == (4, 3, 3)


def test_resolution_bounds_the_maps():
    measured = measure_recall(make_operands(queries=640, keys=640), resolution=4)
    assert measured.computed.shape == measured.exact.shape == (4, 4, 4)
    assert (measured.computed.diagonal(dim1=1, dim2=2) > 0).all()


@torch.no_grad()
def test_profile_of_a_model_counts_exactly():
    model, x = Decoder().eval(), torch.randn(1, 400, 32)
    config = mpass.SparseConfig(mpass.AShape(4, 40), layers={1: BlockSparse(2), 2: "dense"})
    done = profile(model, x, options=OPTIONS | {"config": config})
    assert [layer.layer for layer in done.layers] == [0, 1]
    expected = {}

    def inspect(call, operands):
        sizes = {"batch": 1, "num_queries": 400, "num_keys": 400}
        density = count_density(operands.index, operands.mask, **sizes)[0]
        expected[call.layer] = (density, brute_force(operands)[0])

    torch._dynamo.reset()
    options = OPTIONS | {"config": config, "inner_backend": "eager"}
    with record(inspect):
        torch.compile(model, backend="minference", options=options)(x)
    for layer in done.layers:
        density, recall = expected[layer.layer]
        assert [head.density for head in layer.heads] == density.tolist()
        assert [head.recall for head in layer.heads] == pytest.approx(recall.tolist(), abs=1e-3)
        assert layer.attention_seconds > 0
        assert layer.index_seconds > 0
    assert done.explanation.sites[2].status == "dense"
    assert list(done.seconds) == ["index", "attention", "dense attention", "rest"]
    assert done.seconds["dense attention"] > 0
    assert BlockSparse(2).in_words() in str(done)


SHAPES = {
    "square": {"queries": 450, "keys": 450},
    "batch with padding": {"batch": 2, "mask": AttentionMask(key_mask=PADDED)},
    "fewer queries than keys": {"queries": 150, "keys": 433},
}


@pytest.mark.parametrize(
    ("name", "shape"),
    part_of_today(itertools.product(sorted(registered_patterns()), SHAPES), share=3),
)
def test_recall_and_density_of_every_pattern_are_those_of_brute_force(name, shape):
    """Four query heads over two kv heads, the index by the pattern's own estimation."""
    made = make_operands(**SHAPES[shape])
    pattern = registered_patterns()[name].examples()[0]
    index = estimate_index(made.query, made.key, made.mask, pattern, 0.5)
    operands = dataclasses.replace(made, index=index)
    recall, weights, _, _ = brute_force(operands)
    assert torch.allclose(measure_recall(operands).recall, recall, atol=1e-3)

    batch, _, num_queries, num_keys = weights.shape
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    positions = torch.arange(num_queries) + operands.mask.query_offset
    allowed = reference.allowed_cells(operands.mask, positions, num_keys).expand_as(weights)
    computed = reference.computed_mask(index, operands.mask, **sizes) & allowed
    counted = computed.sum((2, 3)).double() / allowed.sum((2, 3)).double()
    density = count_density(index, operands.mask, **sizes)
    assert torch.equal(density, counted)
    assert (density < 1).any() == (name != "dense")


@torch.no_grad()
def test_inputs_may_be_a_tensor_a_tuple_or_a_mapping():
    model, x = Decoder(depth=1).eval(), torch.randn(1, 200, 32)
    options = OPTIONS | {"pattern": mpass.AShape(4, 40)}
    recalls = [
        [head.recall for head in profile(model, inputs, options=options).layers[0].heads]
        for inputs in (x, (x,), {"x": x})
    ]
    assert recalls[0] == recalls[1] == recalls[2]


@torch.no_grad()
def test_layer_that_ran_dense_is_told():
    options = {"min_seq_len": 128, "dense_above": 0.01, "pattern": mpass.AShape(4, 40)}
    done = profile(Decoder(depth=1).eval(), torch.randn(1, 300, 32), options=options)
    (layer,) = done.layers
    assert layer.lowering == "dense"
    assert layer.heads[0].advice.startswith("dense attention ran: ")


@torch.no_grad()
def test_what_ran_dense_is_told_from_what_was_planned():
    config = mpass.SparseConfig(layers={0: "a_shape(4, 40)", "1-2": "union", 3: BlockSparse(99)})
    options = OPTIONS | {"config": config, "dense_above": 0.6}
    done = profile(Decoder(depth=4).eval(), torch.randn(1, 400, 32), options=options)
    by_layer = {layer.layer: layer for layer in done.layers}
    assert by_layer[0].dense_reason == ""
    assert by_layer[0].ran == by_layer[0].planned != Shares(1.0, 1.0)
    assert all(layer.ran == Shares(1.0, 1.0) for layer in done.dense_layers)
    assert 3 in {layer.layer for layer in done.dense_layers}
    assert done.explanation.ran == (4 - len(done.dense_layers), len(done.dense_layers))
    assert {layer.layer for layer, _ in done.worst_heads(99)} == by_layer.keys() - {
        layer.layer for layer in done.dense_layers
    }
    words = " ".join(str(done).split())
    sparse = 4 - len(done.dense_layers)
    assert f"4 of 4 attentions planned sparse: {sparse} ran sparse on this prompt" in words
    assert "ran dense, layer" in words
    shown = dict((label, value) for value, label in tiles(done.explanation, done))
    assert shown["of these ran sparse"] == f"{sparse} of 4"
    assert "density as planned" not in shown, "what runs dense for its patterns has no plan"


def layer_profile(number: int, reason: str) -> LayerProfile:
    heads = tuple(HeadProfile(h, "a_shape(4, 40)", 0.25, 0.5, (0, 0, 0.1), "") for h in range(2))
    none = torch.zeros(2, 1, 1, dtype=torch.uint8)
    times = {"index_seconds": 0.0, "attention_seconds": 0.0}
    sizes = {"num_queries": 64, "num_keys": 64, "index_bytes": 0}
    which = {"lowering": "dense" if reason else "cpu", "dense_reason": reason, "path": ""}
    return LayerProfile(
        number, **which, **sizes, **times, query_blocks=(0,), all_queries=True, heads=heads,
        computed=none, exact=none,
    )  # fmt: skip


def test_a_layer_that_ran_dense_shows_its_plan_and_no_worst_head():
    layers = [layer_profile(0, ""), *(layer_profile(n, f"{60 + n}% is too much") for n in (1, 2))]
    explanation = Explanation("toy", (), (), 128)
    done = Profile(
        explanation, tuple(layers), {"index": 0.0, "attention": 1.0, "dense attention": 3.0}, ()
    )
    lines = str(done).splitlines()
    (sparse,) = [line for line in lines if line.startswith("│ 0")]
    assert "25.0%" in sparse and "planned" not in sparse and "0: 50.0%" in sparse
    (dense,) = [line for line in lines if line.startswith("│ 1")]
    assert [cell.strip() for cell in dense.split("│")][3:6] == [
        "100.0%, planned 25.0%",
        "100.0%, planned 50.0%",
        "-",
    ]
    assert "ran dense, layers 1-2: 61% is too much (the first; numbers differ)" in lines
    shown = dict((label, value) for value, label in tiles(explanation, done))
    assert (shown["density that ran, mean over heads"], shown["density as planned"]) == (
        "75.0%",
        "25.0%",
    )


def test_time_of_dense_attention_inside_of_an_op_counts_as_dense(monkeypatch):
    ops = ["masked_attention", "union", "sparse_attention", "union", "sparse_attention"]
    events = [made_event(f"minference::{op}", at) for at, op in enumerate(ops)]
    events[0].time_range.end = 3.5  # it contains the first two
    monkeypatch.setattr(torch.profiler, "profile", lambda **_: FakeProfiler(events))
    steps, parts = time_ops(lambda: None, ran_dense=[True, False])
    assert steps == [(0.9, 0.9)] * 2
    assert (parts["index"], parts["attention"], parts["dense attention"]) == (1.8, 0.9, 0.9)


def made_event(name: str, start: float) -> SimpleNamespace:
    span = SimpleNamespace(start=start, end=start + 0.9)
    return SimpleNamespace(name=name, time_range=span, cpu_time_total=0.9e6)


class FakeProfiler(contextlib.AbstractContextManager):
    def __init__(self, made):
        self.made = made

    def __exit__(self, *error):
        return None

    def events(self):
        return self.made


@torch.no_grad()
def test_model_without_sparse_layers_has_an_empty_profile():
    done = profile(Decoder(depth=1).eval(), torch.randn(1, 100, 32), options=OPTIONS)
    assert done.layers == ()
    assert "sparse from 128 on" in done.explanation.sites[0].reason


@torch.no_grad()
def test_saves_json(tmp_path):
    options = OPTIONS | {"pattern": mpass.AShape(4, 40)}
    done = profile(Decoder(depth=2).eval(), torch.randn(1, 200, 32), options=options)
    done.save(tmp_path / "profile.json")
    saved = json.loads((tmp_path / "profile.json").read_text())
    assert saved["layers"][1]["heads"][3]["recall"] == done.layers[1].heads[3].recall


SPIKE = torch.zeros(40, dtype=torch.float64)
SPIKE[7] = 0.2
FLAT = torch.full((400,), 0.2 / 400, dtype=torch.float64)


@pytest.mark.parametrize(
    ("pattern", "by_distance", "by_block", "words"),
    [
        ("vertical_slash(1, 2)", SPIKE, FLAT, "larger slash budget"),
        ("vertical_slash(1, 2)", FLAT, SPIKE, "larger vertical budget"),
        ("a_shape(1, 2)", FLAT, SPIKE, "vertical_slash would find"),
        ("block_sparse(1, 64)", FLAT, SPIKE, "larger top_k"),
        ("vertical_slash(1, 2)", FLAT, FLAT, "spread out: block_sparse"),
        ("union(0.7, 0.02)", FLAT, SPIKE, "more columns"),
        ("union(0.7, 0.02)", SPIKE, FLAT, "a larger mass"),
        ("union(0.7, 0.02)", FLAT, FLAT, "spread out: a larger mass, or dense"),
    ],
)
def test_advice_follows_where_mass_was_lost(pattern, by_distance, by_block, words):
    text = advise(pattern, 0.8, 0.1, by_distance, by_block)
    assert words in text
    assert "loses 20.0%" in text


def test_advice_for_heads_that_do_well():
    assert advise("a_shape(1, 2)", 0.97, 0.1, FLAT, FLAT) == ""
    assert "smaller budget" in advise("a_shape(1, 2)", 0.999, 0.5, FLAT, FLAT)
    assert "nearly every key" in advise("a_shape(1, 2)", 1.0, 1.0, FLAT, FLAT)


@torch.no_grad()
def test_kernels_of_other_models_of_the_process_are_left_out():
    other, mine = torch.randn(1, 2, 200, 24), torch.randn(1, 300, 32)
    mpass.sparse_attention(other, other, other, pattern=mpass.AShape(1, 70))
    found = profile(Decoder(depth=1).eval(), mine, options={**OPTIONS, "pattern": "a_shape"})
    head_dims = {kernel.spec.head_dim for kernel in found.kernels}
    assert head_dims == {Decoder(depth=1).layers[0].head_dim}


def test_checks_of_block_lists_are_no_estimation_of_the_next_layer(monkeypatch):
    ops = ["union", "sparse_attention", "check_block_lists", "union", "sparse_attention"]
    events = [(f"minference::{op}", 1.0) for op in ops]
    monkeypatch.setattr("mpass.inspection.profiling.outermost_ops", lambda *_: iter(events))
    steps, parts = time_ops(lambda: None)
    assert steps == [(1.0, 1.0), (1.0, 1.0)]
    assert (parts["index"], parts["attention"]) == (2.0, 3.0)


@torch.no_grad()
def test_a_profile_tells_how_far_outputs_are_off():
    options = {"pattern": mpass.AShape(4, 40), "min_seq_len": 128, "dense_above": 2.0}
    done = mpass.profile(Decoder(depth=2).eval(), torch.randn(1, 300, 32), options=options)
    errors = [head.error for layer in done.layers for head in layer.heads]
    assert all(0.01 < error < 2 for error in errors)
    assert f"by {max(errors):.1%}" in str(done)
    assert done.as_dict()["layers"][1]["heads"][3]["error"] == errors[7]
