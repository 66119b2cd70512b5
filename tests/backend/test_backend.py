"""torch.compile(model, backend="minference"): what becomes sparse, what stays dense, and why."""

from __future__ import annotations

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch._dynamo.utils import counters

import mpass
from mpass.errors import OptionValueError
from mpass.options import parse_options
from tests.helpers.toys import EVERY_KEY, Attention, Decoder, RecordingBackend, compile_toy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@torch.no_grad()
def test_every_layer_becomes_sparse_and_full_budgets_equal_eager():
    model, x = Decoder().eval(), torch.randn(2, 300, 32)
    out = compile_toy(model, {"pattern": EVERY_KEY, "dense_above": 2.0})(x)
    assert torch.allclose(out, model(x), atol=1e-5)
    report = mpass.last_report()
    assert [site.layer for site in report.sites] == [0, 1, 2]
    assert [site.path for site in report.sites] == [f"layers.{i}" for i in range(3)]
    site = report.sites[0]
    assert (site.num_heads, site.num_kv_heads, site.head_dim) == (4, 2, 8)
    assert site.status == "sparse"
    assert site.patterns == (str(EVERY_KEY),) * 4
    assert "vertical_slash" in str(report)
    assert report.summary().startswith("3 of 3 attention layers, vertical_slash, prompts of 128")
    assert counters["minference"]["sparse_sites"] == 3


@torch.no_grad()
def test_result_is_that_of_the_pattern():
    model, x = Attention().eval(), torch.randn(1, 400, 32)
    pattern = mpass.AShape(2, 60)
    out = compile_toy(model, {"pattern": pattern})(x)
    heads = model.qkv(x).unflatten(-1, (-1, 8)).transpose(1, 2)
    query, key, value = heads.split([4, 2, 2], dim=1)
    attention = mpass.sparse_attention(query, key, value, pattern=pattern, enable_gqa=True)
    assert torch.allclose(out, model.out(attention.transpose(1, 2).flatten(2)), atol=1e-5)
    assert not torch.allclose(out, model(x), atol=1e-3)


@torch.no_grad()
def test_config_gives_layers_and_heads_their_own_patterns():
    config = mpass.SparseConfig(
        default="a_shape",
        layers={1: [mpass.BlockSparse(2), "dense", mpass.AShape(1, 9), "dense"], 2: "dense"},
    )
    backend = RecordingBackend(config=config)
    torch.compile(Decoder().eval(), backend=backend, fullgraph=True)(torch.randn(1, 300, 32))
    sites = mpass.last_report().sites
    assert sites[0].patterns == ("a_shape(128, 1024)",) * 4
    assert sites[1].patterns == ("block_sparse(2, 64)", "dense()", "a_shape(1, 9)", "dense()")
    assert (sites[2].status, "every head" in sites[2].reason) == ("dense", True)
    assert backend.count("minference.join_indexes") == 1
    assert backend.count("minference.sparse_attention") == 2
    assert backend.count("scaled_dot_product_attention") == 1


@torch.no_grad()
def test_one_prefill_graph_serves_all_long_prompts_and_one_dense_the_short():
    model = Decoder(depth=1).eval()
    backend = RecordingBackend(pattern=EVERY_KEY, dense_above=2.0)
    compiled = torch.compile(model, backend=backend, fullgraph=True, dynamic=True)
    for length in (300, 90, 200, 512, 100, 128):
        x = torch.randn(1, length, 32)
        assert torch.allclose(compiled(x), model(x), atol=1e-5), length
    assert len(backend.after) == 2
    with torch.compiler.set_stance("fail_on_recompile"):
        compiled(torch.randn(1, 777, 32))
        compiled(torch.randn(1, 64, 32))


@torch.no_grad()
def test_short_prompts_and_decoding_keep_the_graph_untouched():
    model = Decoder().eval()
    for length, reason in (
        (100, "100 keys, sparse from 128 on"),
        (1, "one query: there is nothing to skip"),
    ):
        backend = RecordingBackend()
        torch.compile(model, backend=backend, fullgraph=True)(torch.randn(1, length, 32))
        before, after = backend.before[0].graph, backend.after[0].graph
        assert [str(n) + str(n.target) for n in before.nodes] == [
            str(n) + str(n.target) for n in after.nodes
        ]
        assert {site.reason for site in mpass.last_report().sites} == {reason}


@torch.no_grad()
def test_range_promised_by_the_user_moves_the_choice_into_the_op():
    model, x = Decoder(depth=1).eval(), torch.randn(1, 300, 32)
    torch._dynamo.mark_dynamic(x, 1, min=64, max=4096)
    compiled = compile_toy(model, {"pattern": mpass.AShape(1, 40), "dense_above": 2.0})
    compiled(x)
    short = torch.randn(1, 100, 32)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(compiled(short), model(short), atol=1e-5)
    assert not torch.allclose(compiled(x), model(x), atol=1e-3)


def test_gradients_keep_a_site_dense():
    model, x = Decoder(depth=1), torch.randn(1, 300, 32)
    out = compile_toy(model)(x)
    assert "torch.no_grad()" in mpass.last_report().sites[0].reason
    out.sum().backward()
    assert model.layers[0].qkv.weight.grad is not None


@torch.no_grad()
def test_dropout_keeps_a_site_dense():
    compile_toy(Decoder(depth=1, dropout=0.5).train())(torch.randn(1, 300, 32))
    assert "dropout" in mpass.last_report().sites[0].reason


@torch.no_grad()
def test_head_dim_over_the_limit_stays_dense():
    compile_toy(Attention(dim=600, heads=2, kv_heads=1).eval())(torch.randn(1, 300, 600))
    assert mpass.last_report().sites[0].reason == "head_dim 300 is over 256"


@torch.no_grad()
def test_dtype_without_kernels_stays_dense():
    compile_toy(Attention().eval().double())(torch.randn(1, 300, 32, dtype=torch.float64))
    assert "torch.float64 is not served" in mpass.last_report().sites[0].reason


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"patern": "dense"}, "unknown option 'patern'.*did you mean 'pattern'"),
        ({"max_autotun": True}, "unknown option 'max_autotun'.*did you mean 'max_autotune'"),
        ({"pattern": "vertical"}, "unknown pattern 'vertical'"),
        ({"pattern": 5}, "option 'pattern' is 5"),
        ({"pattern": "dense", "config": mpass.SparseConfig()}, "not together with 'config'"),
        ({"config": 3}, "option 'config' is 3"),
        ({"config": "x.json"}, "config x.json: 1 fault\n.*cannot be read"),
        ({"min_seq_len": -1}, "option 'min_seq_len' is -1"),
        ({"min_seq_len": True}, "option 'min_seq_len' is True"),
        ({"dense_above": "half"}, "option 'dense_above' is 'half'"),
        ({"inner_backend": "gcc"}, "option 'inner_backend' is 'gcc'.*inductor"),
        ({"max_autotune": "yes", "inner_backend": "inductor"}, "option 'max_autotune' is 'yes'"),
        ({"max_autotune": True}, "'inductor' when Inductor's options are given"),
        ({"config": mpass.SparseConfig(layers={0: ["dense"] * 3})}, "4 query heads.*names 3"),
        ({"config": mpass.SparseConfig(num_layers=2)}, "has 3 layers, the config is for 2 layers"),
    ],
)
@torch.no_grad()
def test_bad_option_is_refused_before_anything_runs(options, words):
    with pytest.raises(BackendCompilerFailed, match=f"(?s){words}"):
        compile_toy(Decoder().eval(), options)(torch.randn(1, 300, 32))


@torch.no_grad()
def test_inductor_options_and_mode_reach_inductor(monkeypatch):
    from torch._inductor import compile_fx as module

    seen = []

    def spy(gm, inputs, config_patches=None):
        seen.append(config_patches)
        return gm.forward

    monkeypatch.setattr(module, "compile_fx", spy)
    options = {"inner_backend": "inductor", "epilogue-fusion": False}
    compile_toy(Decoder(depth=1).eval(), options)(torch.randn(1, 300, 32))
    torch._dynamo.reset()
    compiled = torch.compile(Decoder(depth=1).eval(), backend="minference", mode="reduce-overhead")
    compiled(torch.randn(1, 300, 32))
    assert seen == [{"epilogue_fusion": False}, {"triton.cudagraphs": True}]


@torch.no_grad()
def test_inductor_compiles_the_rewritten_graph():
    model, x = Decoder(depth=2).eval(), torch.randn(1, 256, 32)
    options = {"pattern": EVERY_KEY, "dense_above": 2.0, "inner_backend": "inductor"}
    compiled = compile_toy(model, options)
    assert torch.allclose(compiled(x), model(x), atol=1e-5)
    assert len(mpass.last_report().sparse_sites) == 2


@torch.no_grad()
@pytest.mark.parametrize("dim", [0, 2], ids=["batch", "head_dim"])
def test_dense_attention_fixes_no_size_that_the_user_marked_as_dynamic(dim):
    def attend(query, key, value):
        weights = torch.bmm(query, key.transpose(1, 2)).softmax(-1)
        return torch.bmm(weights, value)

    def inputs(**sizes):
        shape = [4, 200, 16]
        shape[dim] = sizes.get("size", shape[dim])
        return [torch.randn(shape) for _ in range(3)]

    call = inputs()
    for x in call:
        torch._dynamo.mark_dynamic(x, dim)
    compiled = compile_toy(attend, {"pattern": EVERY_KEY})
    assert torch.allclose(compiled(*call), attend(*call), atol=1e-5)
    site = mpass.last_report().sites[0]
    assert (site.num_heads, site.head_dim, site.status) == (1, 16, "dense")
    other = inputs(size=6)
    with torch.compiler.set_stance("fail_on_recompile"):
        assert torch.allclose(compiled(*other), attend(*other), atol=1e-5)


@torch.no_grad()
def test_any_registered_backend_compiles_the_rest():
    """As packages register theirs: its graph holds our ops, its result is what runs."""
    from torch._dynamo.backends.registry import _BACKENDS, register_backend

    seen = []

    def inner_of_the_tests(gm, example_inputs):
        seen.append([str(node.target) for node in gm.graph.nodes])
        return gm.forward

    register_backend(inner_of_the_tests)
    try:
        torch._dynamo.reset()
        options = {"inner_backend": "inner_of_the_tests", "pattern": EVERY_KEY, "min_seq_len": 64}
        query = torch.randn(1, 2, 128, 16)
        run = torch.compile(causal_attention, backend="minference", options=options)
        assert torch.allclose(run(query), causal_attention(query), atol=1e-5)
        assert any("minference.sparse_attention" in target for target in seen[0])
    finally:
        del _BACKENDS["inner_of_the_tests"]


def causal_attention(query):
    return torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)


def test_the_backend_is_not_its_own_inner_backend():
    with pytest.raises(OptionValueError, match="inner_backend"):
        parse_options(None, {"inner_backend": "minference"})
