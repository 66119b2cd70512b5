"""The demo: what it measures is what it says, held against the model run by hand."""

from __future__ import annotations

import dataclasses
import io
import json

import pytest
import torch

import mpass
from mpass.evaluate import demo
from mpass.evaluate.demo import DemoSettings, render, run_demo
from mpass.models.load import load_model
from mpass.models.prefill import compile_body, prefill
from mpass.models.texts import find_text, load_tokens
from tests.helpers.requirements import needs_smollm2
from tests.helpers.rotation import on_its_day

SHORT = DemoSettings(
    length=1024,
    pattern="a_shape(64, 128)",
    min_seq_len=0,
    repeats=1,
    new_tokens=0,
    inner_backend="eager",
)


pytestmark = [needs_smollm2, on_its_day("demo"), pytest.mark.xdist_group("demo")]


def load_four_layers(*arguments, **options):
    """A model of which Dynamo traces little: what is held against it does not ask for all of it."""
    model, tokenizer = load_model(*arguments, **options)
    del model.model.layers[4:]
    model.config.num_hidden_layers = 4
    return model, tokenizer


@pytest.fixture(scope="module")
def result():
    return run_demo(SHORT)


def test_every_attention_of_smollm2_becomes_sparse(result):
    assert (result.sites_sparse, result.sites_total) == (30, 30)
    assert result.heads == {"a_shape(64, 128)": 270}
    assert result.dense_reasons == {}


def test_reported_density_is_that_of_the_pattern(result):
    # A-shape looks at positions alone, so any query and key of this length have its density.
    states = torch.zeros(1, 1, SHORT.length, 16)
    expected = mpass.density(states, states, pattern=mpass.AShape(64, 128))
    assert result.density == pytest.approx(float(expected), rel=1e-6)
    assert result.density < 0.5


def test_dense_figures_are_those_of_the_model_run_by_hand(monkeypatch):
    monkeypatch.setattr(demo, "load_model", load_four_layers)
    result = run_demo(dataclasses.replace(SHORT, new_tokens=2))
    model, tokenizer = load_four_layers("smollm2", dtype=torch.bfloat16)
    tokens = load_tokens(find_text(SHORT.text).read(), tokenizer, SHORT.length)
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False
        )
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    assert result.perplexity_dense == pytest.approx(float(loss.exp()), rel=1e-3)
    assert result.generated_dense == tokenizer.decode(written[0, SHORT.length :])


def test_dense_is_the_fastest_backend_that_is_installed(monkeypatch, tmp_path):
    """A package brings one that gives the graph back as it is, faster than one that waits."""
    (tmp_path / "quickdense.py").write_text(
        "from torch._dynamo import register_backend\n"
        "@register_backend\n"
        "def quickdense(gm, inputs): return gm.forward\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(demo, "PACKAGED_BACKENDS", ("quickdense", "not_installed"))
    slow = demo.compile_body

    def compile_body(model, backend, options=None):
        return slow(model, "eager" if backend == "inductor" else backend, options)

    def timed_prefill(model, forward, tokens):
        return next(times)

    times = iter((3.0, 2.0, 1.0))  # Inductor, the package's, sparse

    monkeypatch.setattr(demo, "load_model", load_four_layers)
    monkeypatch.setattr(demo, "compile_body", compile_body)
    monkeypatch.setattr(demo, "timed_prefill", timed_prefill)
    settings = dataclasses.replace(SHORT, length=200, inner_backend="inductor", new_tokens=0)
    monkeypatch.setattr(DemoSettings, "options", lambda self: {"inner_backend": "eager"})
    found = run_demo(settings)
    assert found.dense_backend == "quickdense"
    assert found.dense_seconds == {"inductor": 3.0, "quickdense": 2.0}
    assert found.speedup == 2.0


def test_a_narrow_window_costs_accuracy_and_the_figures_show_it(result):
    assert result.perplexity_sparse > 1.01 * result.perplexity_dense
    assert 0.5 < result.top1_agreement < 1.0


def test_json_has_the_promised_keys_and_the_settings(result, tmp_path):
    file = tmp_path / "figures.json"
    result.write(file)
    saved = json.loads(file.read_text(encoding="utf-8"))
    promised = """sites_total sites_sparse density prefill_seconds_dense prefill_seconds_sparse
        speedup perplexity_dense perplexity_sparse top1_agreement settings"""
    assert set(promised.split()) <= set(saved)
    assert saved["settings"]["length"] == SHORT.length
    assert saved["speedup"] == pytest.approx(
        saved["prefill_seconds_dense"] / saved["prefill_seconds_sparse"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["figures.json"]


def test_the_table_shows_the_figures(result):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(result))
    shown = console.export_text()
    assert "30 of 30" in shown and f"{result.density:.1%}" in shown


def test_full_budgets_give_the_dense_logits():
    model, tokenizer = load_four_layers("smollm2", dtype=torch.float32)
    tokens = load_tokens(find_text("code").read(), tokenizer, 256)
    torch._dynamo.reset()
    options = {
        "pattern": mpass.VerticalSlash(vertical_size=512, slash_size=512),
        "min_seq_len": 0,
        "dense_above": 2.0,  # or the op would take its way out into dense attention
        "inner_backend": "eager",
    }
    with mpass.record() as log:
        sparse = prefill(compile_body(model, "minference", options), tokens).last_hidden_state
    assert len(log.calls) == 4 and all(call.lowering != "dense" for call in log.calls)
    assert all(bool((call.density == 1).all()) for call in log.calls)
    head = model.get_output_embeddings()
    with torch.no_grad():
        dense = model(tokens).logits
        error = (head(sparse) - dense).abs().max() / dense.abs().max()
    assert float(error) < 1e-4
