"""mpass.last_report() tells the story of a model: its prefill, and what was never compiled."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.lowering.recorder import record
from mpass.story.graphs import kept_graphs
from tests.helpers.toys import EVERY_KEY, OPTIONS, Attention, Decoder, compile_toy, tiny_llama

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@pytest.fixture(scope="module")
def llama():
    return tiny_llama()


def generate(model: nn.Module, length: int = 160) -> None:
    ids = torch.randint(3, 32, (1, length))
    with torch.no_grad():
        model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=3,
            min_new_tokens=3,
            do_sample=False,
            pad_token_id=0,
        )


def compiled_llama(model: nn.Module, **options) -> nn.Module:
    model.__dict__.pop("forward", None)
    model.forward = torch.compile(model.forward, backend="minference", options=OPTIONS | options)
    return model


def test_generate_reports_the_prefill_and_not_the_last_decoding_step(llama):
    generate(compiled_llama(llama))
    assert mpass.reports()[-1].sparse_sites == ()
    report = mpass.last_report()
    assert [(site.layer, site.status) for site in report.sites] == [(0, "sparse"), (1, "sparse")]
    assert report.summary().startswith("2 of 2 attention layers, union, prompts of 128")
    text = str(report)
    assert "decoding" in text
    assert "differ" not in text
    assert "not causal" not in text


def test_a_model_compiled_in_place_reports_its_prefill():
    model = tiny_llama()
    model.compile(backend="minference", options=OPTIONS)
    generate(model)
    assert [site.status for site in mpass.last_report().sites] == ["sparse", "sparse"]


def test_a_wrapper_whose_generate_compiles_nothing_is_told(llama, monkeypatch):
    monkeypatch.setattr("mpass.story.merge.graphs_of_last_model", list)
    before = mpass.reports()
    llama.__dict__.pop("forward", None)
    generate(torch.compile(llama, backend="minference", options=OPTIONS))
    assert mpass.reports() == before
    assert 'model.compile(backend="minference")' in str(mpass.last_report())


def test_a_prompt_that_stays_dense_has_the_reason_of_the_prompt(llama):
    generate(compiled_llama(llama, min_seq_len=4096))
    report = mpass.last_report()
    assert {site.reason for site in report.sites} == {"160 keys, sparse from 4096 on"}
    assert "160 keys, sparse from 4096 on: lower min_seq_len" in str(report)


@torch.no_grad()
def test_what_is_dense_in_another_graph_is_told():
    model = Decoder().eval()
    compiled = torch.compile(model, backend="minference", options=OPTIONS, dynamic=False)
    for length in (300, 100, 1):
        compiled(torch.randn(1, length, 32))
    report = mpass.last_report()
    assert len(report.sparse_sites) == 3
    assert report.graphs == 3
    assert "dense in 1 other graph of the model: 100 keys, sparse from 128 on" in report.notes
    assert any("decoding" in note for note in report.notes)


@torch.no_grad()
def test_decoding_alone_says_that_nothing_can_become_sparse():
    compile_toy(Decoder().eval())(torch.randn(1, 1, 32))
    (note,) = mpass.last_report().notes
    assert note.startswith(
        "only attention of one query was compiled, so that nothing can become sparse"
    )
    assert "model.compile(" in note


class Broken(nn.Module):
    """A model whose graph breaks between its layers and after the last."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(2))

    def forward(self, x):
        x = self.layers[0](x)
        torch._dynamo.graph_break()
        x = self.layers[1](x)
        torch._dynamo.graph_break()
        return x + 1


@torch.no_grad()
def test_graph_breaks_are_named_and_hide_no_layer():
    model = Broken().eval()
    model.compile(backend="minference", options=OPTIONS)
    model(torch.randn(1, 300, 32))
    assert mpass.reports()[-1].sites == ()
    report = mpass.last_report()
    assert [site.layer for site in report.sites] == [0, 1]
    assert len(report.sparse_sites) == 2
    assert any(n.startswith("graph break: ") and "test_story.py" in n for n in report.notes)


@pytest.mark.parametrize("how", ["read at run time", "not read", "no mask"])
@torch.no_grad()
def test_offload_hooks_break_a_model_into_graphs_of_one_story(how):
    """Hooks are not compiled: a layer gets its mask as an input. A report says what helps."""
    accelerate = pytest.importorskip("accelerate", reason="needs accelerate")
    mpass.register_attention()
    model = tiny_llama()
    model.set_attn_implementation("minference" if how == "no mask" else "sdpa")
    ids = torch.randint(3, 32, (1, 300))
    expected = model(ids, use_cache=False).logits
    accelerate.cpu_offload(model, execution_device="cpu")
    config = mpass.SparseConfig(layers={0: EVERY_KEY, 1: EVERY_KEY})
    options = OPTIONS | {"config": config, "read_masks": how != "not read"}
    model.forward = torch.compile(model.forward, backend="minference", options=options)
    out = model(ids, use_cache=False).logits
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=0)
    report = mpass.last_report()
    dense = how == "not read"
    if dense:  # no pattern was looked for, so that one graph serves both layers
        assert [(s.layer, s.status) for s in report.sites] == [(0, "dense")]
        assert any("1 other module of type LlamaAttention" in note for note in report.notes)
    else:
        assert [(s.layer, s.status) for s in report.sites] == [(0, "sparse"), (1, "sparse")]
        assert not any("other module" in note for note in report.notes)
    assert report.graphs > 2
    assert any(n.startswith("graph break: ") and "hooks.py" in n for n in report.notes)
    assert ('attn_implementation="minference"' in str(report).replace("\n", " ")) == dense


@torch.no_grad()
def test_layers_compiled_one_by_one_are_one_model():
    config = mpass.SparseConfig("a_shape", layers={0: "dense"})
    model = Decoder().eval()
    for number, layer in enumerate(model.layers):
        layer.layer_idx = number
        layer.compile(backend="minference", options=OPTIONS | {"config": config})
    model(torch.randn(1, 300, 32))
    report = mpass.last_report()
    assert [site.status for site in report.sites] == ["dense", "sparse", "sparse"]


class Hooked(nn.Module):
    """Layers that differ by a number, each a frame of its own as behind offloading hooks."""

    def __init__(self, depth: int):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(depth))
        for number, layer in enumerate(self.layers):
            layer.number = number

    def forward(self, x):
        for layer in self.layers:
            torch._dynamo.graph_break()
            x = self.call(layer, x)
        return x

    @staticmethod
    def call(layer, x):
        torch._dynamo.graph_break()
        return layer(x) * (layer.number + 1.5)


@torch.no_grad()
def test_the_recompile_limit_and_the_layers_beyond_it_are_named():
    model = Hooked(5).eval()
    model.compile(backend="minference", options=OPTIONS, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        model(torch.randn(1, 300, 32))
    report = mpass.last_report()
    compiled = len(report.sparse_sites)
    assert 0 < compiled < 5
    assert report.summary().startswith(f"{compiled} of 5 attention layers")
    assert [site.path for site in report.sites] == [f"layers.{i}" for i in range(5)]
    reason = "never compiled: Dynamo's recompile_limit (2) was reached"
    assert [site.reason for site in report.sites] == [""] * compiled + [reason] * (5 - compiled)
    assert f"; {5 - compiled} dense: {reason}" in report.summary()
    assert report.summary().endswith("raise torch._dynamo.config.recompile_limit")
    text = str(report)
    assert f"{reason}: raise torch._dynamo.config.recompile_limit" in text
    assert "recompile_limit (2) was reached by 'torch_dynamo_resume_in_call" in text


class Wrapped(nn.Module):
    """Three layers behind a function that differs by a number, as hooks for offloading do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(Attention() for _ in range(3))

    def forward(self, x):
        for number, layer in enumerate(self.layers):
            x = self.hook(layer, x, number)
        return x

    def hook(self, layer, x, number):
        torch._dynamo.graph_break()
        return self.call(layer, x + torch.zeros(1) * number)

    @staticmethod
    def call(layer, x):
        torch._dynamo.graph_break()
        return layer(x)


@torch.no_grad()
def test_layers_below_a_function_over_the_limit_are_not_said_to_be_never_compiled():
    """What the function calls runs by a graph that is there where that fits."""
    model = Wrapped().eval()
    model.compile(backend="minference", options=OPTIONS, dynamic=False)
    with torch._dynamo.config.patch(recompile_limit=1), record() as log:
        model(torch.randn(1, 300, 32))
    report = mpass.last_report()
    assert len(log.calls) == 3
    assert [site.path for site in report.sites] == ["layers.0"]
    assert any(
        "recompile_limit (1) was reached by 'torch_dynamo_resume_in_hook" in note
        for note in report.notes
    )
    assert any("raise torch._dynamo.config.recompile_limit" in note for note in report.notes)
    (note,) = (note for note in report.notes if "2 other modules of type Attention" in note)
    assert note.endswith("such as that of layers.0, or without the compiler")


@torch.no_grad()
def test_another_model_has_a_report_of_its_own():
    first, second = Decoder(depth=2).eval(), Decoder(depth=1).eval()
    compile_toy(first)(torch.randn(1, 300, 32))
    compile_toy(second)(torch.randn(1, 200, 32))
    assert len(mpass.last_report().sites) == 1
    assert len(mpass.reports()[-2].sites) == 2


@torch.no_grad()
@pytest.mark.parametrize("how", ["reset", "other options", "compiled again"])
def test_a_model_compiled_anew_has_a_new_report(how):
    model, x = Decoder(depth=1).eval(), torch.randn(1, 300, 32)
    compile_toy(model)(x)
    if how == "reset":
        torch._dynamo.reset()
    options = {"min_seq_len": 1000} if how == "other options" else {}
    compile_toy(model, options)(x if how != "compiled again" else x[:, :100])
    report = mpass.last_report()
    assert report.graphs == 1
    assert len(kept_graphs()) >= 2


@torch.no_grad()
def test_functions_have_reports_of_their_own():
    def attend(x):
        torch._dynamo.graph_break()
        y = F.scaled_dot_product_attention(x, x, x, is_causal=True)
        torch._dynamo.graph_break()
        return y + 1

    def other(x):
        return x * 2

    options = {"backend": "minference", "options": OPTIONS}
    torch.compile(attend, **options)(torch.randn(1, 2, 300, 16))
    assert [site.status for site in mpass.last_report().sites] == ["sparse"]
    torch.compile(other, **options)(torch.randn(3))
    assert mpass.last_report().sites == ()
    assert mpass.last_report().summary() == "no attention in 1 compiled graph"


class Buffered(nn.Module):
    """nanoGPT's causal mask: a buffer, which may hold anything."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", torch.ones(512, 512).tril())

    def forward(self, x):
        n = x.shape[2]
        scores = (x @ x.mT * 0.25).masked_fill(self.bias[:n, :n] == 0, float("-inf"))
        return scores.softmax(-1) @ x


@torch.no_grad()
def test_a_mask_kept_as_a_buffer_has_the_name_that_the_user_gave_it():
    compile_toy(Buffered())(torch.randn(1, 2, 300, 16))
    (site,) = mpass.last_report().sites
    if site.status == "dense":
        assert "self.bias is an input whose values are unknown" in site.reason
        assert "build the mask inside the compiled model" in site.remedy


@pytest.mark.parametrize(
    ("compiles", "resets"),
    [
        (("0/0", "0/1", "1/0", "0/2"), 0),
        (("1/0", "2/0", "1/1", "0/0", "1/0", "1/1"), 1),
        (("0/1", "0/0", "0/1", "0/2"), 1),  # 0/0 was another backend's before the reset
        (("3/0", "3/0", "0/0"), 2),
    ],
)
def test_a_reset_is_seen_from_the_numbers_of_compiles(compiles, resets, monkeypatch):
    """Not first from a number that comes again: the graphs before it are of the model, too."""
    from mpass.story import graphs

    monkeypatch.setattr(graphs, "_history", graphs.History(graphs.deque(maxlen=9), {}))
    for one in compiles:
        frame, number = map(int, one.split("/"))
        graphs.note_reset(SimpleNamespace(frame_id=frame, frame_compile_id=number))
    assert graphs._history.resets == resets
