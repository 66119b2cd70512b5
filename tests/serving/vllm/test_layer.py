"""A step of vLLM: long prefills go through mpass, the rest to the parent, and all is right."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import mpass
from mpass.errors import ConfigMismatchError
from mpass.lowering.recorder import record
from mpass.serving.vllm import builder as builders
from mpass.serving.vllm import layer as layers
from mpass.serving.vllm.builder import SparseBuilder
from mpass.serving.vllm.counters import Counters
from mpass.serving.vllm.layer import ATTRIBUTE, SparseForward
from mpass.serving.vllm.pages import PageLayout, gather
from mpass.serving.vllm.settings import LayerFacts, LayerPlan, read_settings
from tests.helpers.fake_vllm import Attention, Builder, make_step
from tests.helpers.truth import TOLERANCE, dense_attention

NAME = "model.layers.1.self_attn.attn"
EVERY_KEY = "vertical_slash(1, 1048576)"
LONG = {"pattern": EVERY_KEY, "min_seq_len": 256, "dense_above": 1.0}


class Layer(SparseForward, Attention):
    """A layer of vLLM with the plugin's forward before it."""

    sparse_dtype = torch.float32

    def __init__(self, obstacle="", **given):
        super().__init__(4, 32, 32**-0.5, 2)
        self.sparse_settings = read_settings({"minference": {**LONG, **given}}, "")
        self.obstacle = obstacle
        self.layer_name = NAME

    def sparse_facts(self, name):
        return LayerFacts(1, 4, 2, 32, torch.float32, "cpu", obstacle=self.obstacle)

    def read_pages(self, layer, kv_cache, blocks, length):
        return gather(kv_cache, blocks, length, PageLayout())


class StepBuilder(SparseBuilder, Builder):
    pass


@pytest.fixture
def counters(monkeypatch):
    own = Counters()
    for module in (layers, builders):
        monkeypatch.setattr(module, "process_counters", lambda: own)
    return own


@pytest.fixture
def engine(monkeypatch, counters):
    """Makes a builder of one layer, without building kernels."""
    monkeypatch.setattr(builders, "warm_layers", lambda layers, device: False)

    def make(layer):
        known = SimpleNamespace(static_forward_context={NAME: SimpleNamespace(impl=layer)})
        return StepBuilder(None, [NAME], SimpleNamespace(compilation_config=known), "cpu")

    return make


def run(layer, step, metadata, unpaged=True):
    """The layer over a step; vLLM gives no keys where a layer shares another one's."""
    output = step.output()
    own = (step.key, step.value) if unpaged else (None, None)
    found = layer.forward(layer, step.query, *own, step.kv_cache, metadata, output)
    assert found is output
    return output


def check(step, output, tolerance=TOLERANCE[torch.float32]):
    """Every row of every request is attention over all keys before it."""
    starts = step.common.query_start_loc.tolist()
    for request, (query, key, value) in enumerate(step.sequences):
        queries, keys = query.shape[2], key.shape[2]
        cells = torch.ones(queries, keys, dtype=torch.bool).tril(keys - queries)[None, None]
        truth = dense_attention(query, key, value, cells, 32**-0.5)
        rows = output[starts[request] : starts[request + 1]].transpose(0, 1)[None]
        assert (rows - truth).abs().max() < tolerance, request


@pytest.mark.parametrize("unpaged", [True, False], ids=["keys given", "keys in pages"])
def test_a_mixed_batch_is_right_in_every_row(engine, counters, unpaged):
    layer = Layer()
    builder = engine(layer)
    step = make_step([(30, 0), (300, 0), (1, 400), (5, 2), (200, 150), (1, 9)], padding=3)
    output = run(layer, step, builder.build(0, step.common), unpaged)
    check(step, output)
    assert layer.served == [30, 6, 1], "the parent serves what is not long, in runs"
    assert output[-3:].isnan().all(), "rows of padding are nobody's"
    assert counters.sparse == 2 and counters.gathered == (1 if unpaged else 2)
    assert (counters.prefills, counters.prefill_tokens) == (2, 500)


def test_a_prompt_in_chunks_is_what_attend_computes_for_each(engine, counters):
    pattern = mpass.AShape(64, 64)
    layer = Layer(pattern="a_shape(64, 64)", dense_above=1.0)
    builder = engine(layer)
    for context in (0, 256, 512):
        step = make_step([(256, context)])
        output = run(layer, step, builder.build(0, step.common))
        query, key, value = step.sequences[0]
        expected = mpass.attend(
            query, key, value, patterns=pattern, query_offset=context, dense_above=1.0
        )
        assert (output.transpose(0, 1)[None] - expected).abs().max() < 1e-5
    assert layer.served == [] and counters.gathered == 2


def test_heads_that_would_lose_more_than_is_promised_are_computed_whole(engine, counters):
    layer = Layer()
    builder = engine(layer)
    step = make_step([(300, 0), (280, 150)])
    bare = LayerPlan(1, (mpass.AShape(1, 64),) * 4, least=layer.plan_for(NAME).least)
    for most_lost in (1.0, 0.2):
        layer.sparse_plan = replace(bare, most_lost=most_lost)
        output = run(layer, step, builder.build(0, step.common))
        if most_lost < 1:
            check(step, output)
        else:
            with pytest.raises(AssertionError):
                check(step, output)
    assert counters.sparse == 4 and layer.served == []


def test_a_step_without_long_prefills_is_one_call_of_the_parent(engine, counters):
    layer = Layer()
    builder = engine(layer)
    step = make_step([(1, 600), (100, 0), (1, 3)])
    check(step, run(layer, step, builder.build(0, step.common)))
    assert layer.served == [102] and counters.as_dict()["sparse"] == 0
    assert len(builder.built) == 1


def test_runs_of_the_parent_have_no_schedule_of_their_own(engine):
    builder = engine(Layer())
    step = make_step([(30, 0), (300, 0)])
    builder.build(0, step.common)
    assert [fast for _, fast in builder.built] == [False, True]


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False},
        {"causal": torch.ones(1, dtype=torch.int32)},
        {"mm_req_doc_ranges": {0: [(3, 9)]}},
        {"rswa_prefix_lens": torch.tensor([9])},
    ],
    ids=["bidirectional", "by request", "images", "reference window"],
)
def test_a_batch_with_another_mask_is_the_parents(engine, change):
    builder = engine(Layer())
    metadata = builder.build(0, replace(make_step([(300, 0)]).common, **change))
    assert getattr(metadata, ATTRIBUTE) is None


def test_lengths_that_only_the_device_knows_are_not_asked_for(engine):
    builder = engine(Layer())
    common = make_step([(300, 0)]).common
    unknown = replace(common, seq_lens_cpu_upper_bound=None)
    assert getattr(builder.build(0, unknown), ATTRIBUTE) is not None, "on a CPU there is no wait"
    on_device = replace(unknown, seq_lens=torch.empty(1, dtype=torch.int32, device="meta"))
    assert getattr(builder.build(0, on_device), ATTRIBUTE) is None


def test_what_is_captured_into_a_graph_is_the_parents_way(engine):
    builder = engine(Layer())
    metadata = builder.build_for_cudagraph_capture(make_step([(300, 0)]).common)
    assert getattr(metadata, ATTRIBUTE) is None


def test_a_table_of_another_group_of_layers_makes_the_split_void(engine):
    layer = Layer()
    builder = engine(layer)
    step = make_step([(300, 0), (10, 0)])
    metadata = builder.build(0, step.common)
    metadata.block_table = metadata.block_table.clone()
    check(step, run(layer, step, metadata))
    assert layer.served == [310]


def test_a_layer_with_an_obstacle_is_the_parents_beside_one_without(engine, monkeypatch):
    with_window, plain = Layer(obstacle="a sliding window"), Layer()
    builder = engine(plain)
    step = make_step([(300, 0), (10, 0)])
    metadata = builder.build(0, step.common)
    check(step, run(with_window, step, metadata))
    assert with_window.served == [310]


def test_layers_may_differ_in_the_shortest_prompt(monkeypatch, counters):
    monkeypatch.setattr(builders, "warm_layers", lambda layers, device: False)
    early, late = Layer(min_seq_len=256), Layer(min_seq_len=512)
    known = {NAME: SimpleNamespace(impl=early), "other.2": SimpleNamespace(impl=late)}
    config = SimpleNamespace(compilation_config=SimpleNamespace(static_forward_context=known))
    builder = StepBuilder(None, list(known), config, "cpu")
    step = make_step([(300, 0), (600, 0)])
    metadata = builder.build(0, step.common)
    for layer, served in ((early, []), (late, [300])):
        check(step, run(layer, step, metadata))
        assert layer.served == served
    assert counters.prefills == 2


def test_a_profiling_run_has_no_metadata(engine):
    layer = Layer()
    step = make_step([(300, 0)])
    assert (run(layer, step, None) == 0).all()


def test_a_failure_of_ours_leaves_the_layer_to_vllm_and_the_answer_right(
    engine, counters, monkeypatch, caplog
):
    monkeypatch.setenv("MPASS_STRICT", "0")
    layer = Layer()
    builder = engine(layer)

    def fail(*arguments, **settings):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr(layers, "attend", fail)
    step = make_step([(300, 0), (10, 0)])
    metadata = builder.build(0, step.common)
    with pytest.warns(match="no such kernel"):
        check(step, run(layer, step, metadata))
    check(step, run(layer, step, metadata))
    assert counters.failed == 1 and layer.served == [310, 310]
    assert "layer 1 is vLLM's own from now on" in caplog.text


def test_a_failure_in_splitting_leaves_the_step_to_vllm(engine, monkeypatch):
    monkeypatch.setenv("MPASS_STRICT", "0")
    builder = engine(Layer())

    def fail(*arguments):
        raise RuntimeError("no such request")

    monkeypatch.setattr(builders, "split_batch", fail)
    with pytest.warns(match="no such request"):
        metadata = builder.build(0, make_step([(300, 0)]).common)
    assert getattr(metadata, ATTRIBUTE) is None and builder.sparse_limits == ()


def test_pages_of_another_dtype_are_the_parents(engine):
    layer = Layer()
    builder = engine(layer)
    step = make_step([(300, 0)])
    metadata = builder.build(0, step.common)
    step.kv_cache = step.kv_cache.double()
    check(step, run(layer, step, metadata))
    assert layer.served == [300]


def test_densities_are_counted_where_that_is_asked_for(engine, counters):
    layer = Layer(pattern="a_shape(64, 64)", record=True)
    step = make_step([(600, 0)])
    run(layer, step, engine(layer).build(0, step.common))
    counts = counters.as_dict()
    assert counts["recorded"] == 1 and 0.1 < counts["density"] < 0.6
    layer = Layer(record=True, dense_above=0.5)
    run(layer, step, engine(layer).build(0, step.common))
    assert counters.ran_dense == 1


def test_a_config_of_another_model_ends_the_start_of_the_engine(engine):
    with pytest.raises(ConfigMismatchError, match="layer 1 has 4 query heads"):
        engine(Layer(pattern=None, config={"num_heads": 9}))


def test_kernels_are_built_once_for_layers_that_are_alike(monkeypatch):
    from mpass.serving.vllm import warm

    ran = []
    monkeypatch.setattr(warm, "build_together", lambda *arguments: None)
    alike = [Layer(), Layer(), Layer(pattern="a_shape(64, 64)"), Layer(obstacle="ALiBi")]
    for layer in alike:
        layer.plan_for(NAME)
        monkeypatch.setattr(
            layer, "attention", lambda *arguments, own=layer: ran.append((own, arguments[-1]))
        )
    assert warm.warm_layers(alike, "cpu")
    assert ran == [(alike[0], 0), (alike[0], 128), (alike[2], 0), (alike[2], 128)]
    assert not warm.warm_layers(alike, "cpu") and len(ran) == 4


@pytest.mark.parametrize("device", ["cpu", torch.device("cpu")], ids=str)
def test_warming_runs_the_attention_that_a_request_will_run(device, caplog, counters):
    from mpass.serving.vllm.warm import warm_layers

    layer = Layer()
    layer.plan_for(NAME)
    before = torch.random.get_rng_state()
    with caplog.at_level("DEBUG", "vllm.mpass"), record() as calls:
        assert warm_layers([layer], device)
    assert caplog.text == "", "nothing failed"
    assert [(call.num_queries, call.num_keys) for call in calls.calls] == [(256, 256), (128, 256)]
    assert counters.sparse == 0
    assert torch.equal(before, torch.random.get_rng_state()), "the engine's seed is untouched"
