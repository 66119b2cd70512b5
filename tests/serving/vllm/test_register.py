"""The entry point: vLLM starts in any case, and a vLLM that is known gets our backends.

vLLM itself is a stand-in here; tests/serving/vllm/test_engine.py runs the real one.
"""

from __future__ import annotations

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from mpass.errors import ConfigMismatchError, EngineSettingError
from mpass.serving.vllm import register
from mpass.serving.vllm.layer import ATTRIBUTE
from tests.helpers.fake_vllm import PAGE, AttentionCGSupport, Engine, make_step
from tests.helpers.processes import run_python
from tests.serving.vllm.test_layer import EVERY_KEY, NAME, check, run

CUSTOM = {"CUSTOM": "mpass.serving.vllm.cuda.SparseFlashBackend"}


@pytest.fixture
def engine(monkeypatch):
    made = Engine(additional_config={"minference": {"pattern": EVERY_KEY, "min_seq_len": 256}})
    made.install(monkeypatch)
    return made


def flash(engine):
    """Our backend over the stand-in of FlashAttention."""
    return importlib.import_module("mpass.serving.vllm.cuda").SparseFlashBackend


def make_layer(engine, name=NAME, heads=4, kv_heads=2, **settings):
    layer = flash(engine).get_impl_cls()(heads, 32, 32**-0.5, kv_heads, **settings)
    layer.layer_name = name
    engine.layers[name] = SimpleNamespace(impl=layer)
    return layer


def warnings_of(caplog):
    return [line for line in caplog.records if line.name == "vllm.mpass"]


def test_cuda_gets_our_backend_under_the_name_custom(engine, caplog):
    register()
    register()
    assert engine.registered == CUSTOM and not warnings_of(caplog)
    assert flash(engine).get_name() == "CUSTOM"
    assert not flash(engine).supports_batch_invariance()
    assert not flash(engine).supports_device_cpu_query_lens_mismatch()


def test_the_environment_switches_the_plugin_off(engine, monkeypatch):
    monkeypatch.setenv("MPASS_VLLM", "0")
    register()
    assert engine.registered == {}


def test_without_vllm_the_entry_point_warns_once_and_raises_nothing(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "vllm", None)
    for name in ("registration", "engine", "cpu", "cuda"):
        monkeypatch.delitem(sys.modules, f"mpass.serving.vllm.{name}", raising=False)
    register()
    assert len(warnings_of(caplog)) == 1
    assert "which keeps its own attention" in caplog.text


@pytest.mark.parametrize("fault", ["a name is gone", "arguments differ", "mpass is broken"])
def test_another_vllm_keeps_its_own_backend_with_one_warning(engine, monkeypatch, caplog, fault):
    own = sys.modules["vllm.v1.attention.backends.flash_attn"]
    if fault == "a name is gone":
        monkeypatch.delattr(own, "FlashAttentionImpl")
    elif fault == "arguments differ":

        def forward(self, layer, query, kv_cache, output):
            return output

        monkeypatch.setattr(own.FlashAttentionImpl, "forward", forward)
    else:
        monkeypatch.setitem(sys.modules, "mpass.serving.vllm.pages", None)
    register()
    assert engine.registered == {} and len(warnings_of(caplog)) == 1


def test_importing_the_plugin_imports_no_vllm():
    code = (
        "import sys, mpass.serving.vllm; print([m for m in sys.modules if m in ('vllm', 'torch')])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


def test_a_step_through_the_backend_of_cuda_is_right(engine):
    layer = make_layer(engine)
    builder = flash(engine).get_builder_cls()(None, [NAME], engine.vllm_config, "cpu")
    step = make_step([(30, 0), (300, 0), (300, 100), (1, 400)], padding=2)
    metadata = builder.build(0, step.common)
    assert len(getattr(metadata, ATTRIBUTE).metadata) == 2
    check(step, run(layer, step, metadata))
    assert layer.served == [30, 1]


def test_no_graph_holds_a_step_with_prefills(engine):
    builder = flash(engine).get_builder_cls()
    parent = sys.modules["vllm.v1.attention.backends.flash_attn"].FlashAttentionMetadataBuilder
    assert parent.get_cudagraph_support(None, None) is AttentionCGSupport.ALWAYS
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH
    assert builder._cudagraph_support is AttentionCGSupport.UNIFORM_BATCH
    parent._cudagraph_support = AttentionCGSupport.NEVER
    assert builder.get_cudagraph_support(None, None) is AttentionCGSupport.NEVER
    assert not builder.supports_update_block_table


def test_a_profiling_run_takes_the_memory_of_the_longest_sequence(engine, monkeypatch):
    layer = make_layer(engine)
    cuda = importlib.import_module("mpass.serving.vllm.cuda")
    asked = []
    monkeypatch.setattr(
        cuda, "torch", SimpleNamespace(empty=lambda shape, **settings: asked.append(shape))
    )
    run(layer, make_step([(PAGE, 0)]), None)
    assert asked == [(2, 2, 4096, 2, 32)]


@pytest.mark.parametrize(
    "settings, changes, reason",
    [
        ({"sliding_window": 64}, {}, "a sliding window"),
        ({"alibi_slopes": [1.0] * 4}, {}, "ALiBi"),
        ({"attn_type": "encoder_only"}, {}, "encoder_only attention"),
        ({"kv_cache_dtype": "fp8"}, {}, "pages of fp8"),
        ({}, {"runner_type": "draft"}, "a draft model"),
        ({"kv_cache_dtype": "float32"}, {}, ""),
    ],
    ids=["window", "ALiBi", "encoder", "fp8", "draft", "the model's own dtype"],
)
def test_what_is_not_plain_prefill_is_the_parents(engine, settings, changes, reason):
    for name, value in changes.items():
        setattr(engine, name, value)
    layer = make_layer(engine, **settings)
    assert layer.plan_for(NAME).reason == reason


def test_context_parallelism_and_chunked_attention_are_the_parents(engine):
    layer = make_layer(engine)
    layer.dcp_world_size = 2
    assert "spread over ranks" in layer.plan_for(NAME).reason
    layer = make_layer(engine)
    engine.layers[NAME].attention_chunk_size = 8192
    assert layer.plan_for(NAME).reason == "attention in chunks"


def test_a_layer_whose_number_is_unknown_is_the_parents(engine):
    layer = make_layer(engine, name="model.blocks.1.parts.2.attn")
    assert "is unknown" in layer.plan_for("model.blocks.1.parts.2.attn").reason


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_gets_the_patterns_of_its_own_heads(engine, rank):
    engine.rank, engine.ranks = rank, 2
    names = ["a_shape(64, 64)", "a_shape(64, 128)", "a_shape(64, 192)", "a_shape(64, 256)"]
    config = {"layers": {"1": names}}
    engine.additional_config = {"minference": {"config": config}}
    plan = make_layer(engine, heads=2, kv_heads=1).plan_for(NAME)
    assert [pattern.window_size for pattern in plan.patterns] == [
        64 * (2 * rank + head + 1) for head in range(2)
    ]


def test_wrong_settings_end_the_start_of_the_engine(engine):
    engine.additional_config = {"minference": {"patern": "union"}}
    with pytest.raises(EngineSettingError, match="pattern"):
        make_layer(engine)
    config = {"num_layers": 30, "num_heads": 9}
    engine.additional_config = {"minference": {"config": config}}
    with pytest.raises(ConfigMismatchError, match="30 layers"):
        make_layer(engine)


def test_a_config_for_the_target_is_not_held_against_its_draft_model(engine):
    config = {"num_layers": 30}
    engine.additional_config = {"minference": {"config": config}}
    engine.runner_type = "draft"
    assert make_layer(engine).plan_for(NAME).reason == "a draft model"


def test_the_dtype_of_a_layer_is_the_models(engine):
    engine.dtype = torch.bfloat16
    assert make_layer(engine).sparse_dtype is torch.bfloat16
