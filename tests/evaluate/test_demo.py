"""The demo: what it measures is what it says, and bad input is refused before a model runs."""

from __future__ import annotations

import dataclasses
import io
import json
import sys

import pytest
import torch

import mpass
from mpass.cli.app import app, main
from mpass.config.pattern_text import parse_pattern
from mpass.errors import (
    ConfigFileError,
    ConfigMismatchError,
    DeviceError,
    DtypeError,
    MpassError,
    OptionValueError,
    PatternValueError,
    TextTooShortError,
    UnknownPatternError,
    UnknownTextError,
)
from mpass.evaluate import demo
from mpass.evaluate.demo import DemoSettings, check_settings, render, run_demo
from mpass.models.load import load_model
from mpass.models.prefill import compile_body, continue_text, predict, prefill
from mpass.models.texts import find_text, load_tokens
from tests.helpers.processes import run_python
from tests.helpers.requirements import needs_smollm2
from tests.helpers.rotation import on_its_day

SHORT = DemoSettings(
    length=1024,
    pattern="a_shape(64, 128)",
    min_seq_len=0,
    repeats=1,
    new_tokens=2,
    inner_backend="eager",
)


pytestmark = pytest.mark.xdist_group("demo")


@pytest.fixture(scope="module")
def smollm2():
    return load_model("smollm2", dtype=torch.bfloat16)


@pytest.fixture(scope="module")
def result():
    return run_demo(SHORT)


@needs_smollm2
@on_its_day("demo")
def test_every_attention_of_smollm2_becomes_sparse(result):
    assert (result.sites_sparse, result.sites_total) == (30, 30)
    assert result.heads == {"a_shape(64, 128)": 270}
    assert result.dense_reasons == {}


@needs_smollm2
@on_its_day("demo")
def test_reported_density_is_that_of_the_pattern(result):
    # A-shape looks at positions alone, so any query and key of this length have its density.
    states = torch.zeros(1, 1, SHORT.length, 16)
    expected = mpass.density(states, states, pattern=mpass.AShape(64, 128))
    assert result.density == pytest.approx(float(expected), rel=1e-6)
    assert result.density < 0.5


@needs_smollm2
@on_its_day("demo")
def test_dense_figures_are_those_of_the_model_run_by_hand(result, smollm2):
    model, tokenizer = smollm2
    tokens = load_tokens(find_text(SHORT.text).read(), tokenizer, SHORT.length)
    with torch.no_grad():
        logits = model(tokens).logits[0].float()
        written = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=2, do_sample=False
        )
    loss = torch.nn.functional.cross_entropy(logits[:-1], tokens[0, 1:])
    assert result.perplexity_dense == pytest.approx(float(loss.exp()), rel=1e-3)
    assert result.generated_dense == tokenizer.decode(written[0, SHORT.length :])


@needs_smollm2
@on_its_day("demo")
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
    monkeypatch.setattr(demo, "compile_body", compile_body)
    monkeypatch.setattr(demo, "timed_prefill", timed_prefill)
    settings = dataclasses.replace(SHORT, length=200, inner_backend="inductor", new_tokens=0)
    monkeypatch.setattr(DemoSettings, "options", lambda self: {"inner_backend": "eager"})
    found = run_demo(settings)
    assert found.dense_backend == "quickdense"
    assert found.dense_seconds == {"inductor": 3.0, "quickdense": 2.0}
    assert found.speedup == 2.0


@needs_smollm2
@on_its_day("demo")
def test_a_narrow_window_costs_accuracy_and_the_figures_show_it(result):
    assert result.perplexity_sparse > 1.01 * result.perplexity_dense
    assert 0.5 < result.top1_agreement < 1.0


@needs_smollm2
@on_its_day("demo")
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


@needs_smollm2
@on_its_day("demo")
def test_the_table_shows_the_figures(result):
    from rich.console import Console

    console = Console(width=120, record=True, file=io.StringIO())
    console.print(render(result))
    shown = console.export_text()
    assert "30 of 30" in shown and f"{result.density:.1%}" in shown


@needs_smollm2
@on_its_day("demo")
def test_full_budgets_give_the_dense_logits(smollm2):
    model, tokenizer = smollm2
    model = model.float()
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
    assert len(log.calls) == 30 and all(call.lowering != "dense" for call in log.calls)
    assert all(bool((call.density == 1).all()) for call in log.calls)
    head = model.get_output_embeddings()
    with torch.no_grad():
        dense = model(tokens).logits
        error = (head(sparse) - dense).abs().max() / dense.abs().max()
    model.bfloat16()
    assert float(error) < 1e-4


@pytest.mark.parametrize("length", [2, 511, 512, 513, 1100])
def test_predictions_in_chunks_are_those_of_all_logits_at_once(length):
    generator = torch.Generator().manual_seed(length)
    head = torch.nn.Linear(8, 32, bias=False)

    class Model:
        config = type("Config", (), {"get_text_config": lambda self: self})()

        def get_output_embeddings(self):
            return head

    hidden = torch.randn(1, length, 8, generator=generator)
    tokens = torch.randint(32, (1, length), generator=generator)
    got = predict(Model(), hidden, tokens)
    with torch.no_grad():
        scores = head(hidden[0]).double()
    expected = scores[:-1].log_softmax(-1).gather(-1, tokens[0, 1:, None])[:, 0]
    torch.testing.assert_close(got.log_likelihood.double(), expected, rtol=1e-5, atol=1e-5)
    assert torch.equal(got.top_token, scores.argmax(-1))
    assert got.perplexity == pytest.approx(float((-expected.mean()).exp()), rel=1e-5)


@needs_smollm2
def test_continuation_runs_the_given_forward_and_leaves_the_model_as_it_was(smollm2):
    model, tokenizer = smollm2
    tokens = load_tokens(find_text("code").read(), tokenizer, 64)
    lengths = []

    def forward(**arguments):
        lengths.append(arguments["input_ids"].shape[1])
        return type(model.model).forward(model.model, **arguments)

    output = prefill(forward, tokens)
    assert len(continue_text(model, forward, output, tokens, 3)) == 3
    assert lengths == [64, 1, 1]
    assert "forward" not in vars(model.model)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"pattern": "vertical_slsh"}, UnknownPatternError),
        ({"pattern": "vertical_slash(-1, 5)"}, PatternValueError),
        ({"pattern": "block_sparse(0)"}, PatternValueError),
        ({"pattern": "block_sparse(top=3)"}, OptionValueError),
        ({"pattern": "1 + 1"}, OptionValueError),
        ({"pattern": "a_shape("}, OptionValueError),
        ({"pattern": "dense", "config": "CONFIG"}, OptionValueError),
        ({"config": "no/such/file"}, ConfigFileError),
        ({"dtype": "fp8"}, DtypeError),
        ({"device": "tpu9"}, DeviceError),
        ({"length": 0}, OptionValueError),
        ({"length": -8}, OptionValueError),
        ({"repeats": 0}, OptionValueError),
        ({"new_tokens": -1}, OptionValueError),
        ({"min_seq_len": -1}, OptionValueError),
        ({"inner_backend": "gcc"}, OptionValueError),
        ({"text": "no/such/file"}, UnknownTextError),
    ],
)
def test_bad_settings_are_refused_before_anything_is_loaded(change, error, monkeypatch, tmp_path):
    monkeypatch.setattr(demo, "load_model", forbidden)
    monkeypatch.setattr(demo, "load_tokenizer", forbidden)
    mpass.SparseConfig("dense").save(tmp_path / "config.json")
    settings = DemoSettings(**change)
    if settings.config == "CONFIG":
        settings = dataclasses.replace(settings, config=str(tmp_path / "config.json"))
    with pytest.raises(error):
        check_settings(settings)
    with pytest.raises(error):
        run_demo(settings)


def forbidden(*arguments, **options):
    raise AssertionError("a model was loaded")


@needs_smollm2
def test_a_text_shorter_than_the_prompt_is_refused_before_the_model_is_loaded(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(demo, "load_model", forbidden)
    file = tmp_path / "short.txt"
    file.write_text("far too short")
    with pytest.raises(TextTooShortError):
        run_demo(DemoSettings(text=str(file)))
    file.write_text(" \n")
    with pytest.raises(UnknownTextError, match="empty"):
        run_demo(DemoSettings(text=str(file)))


@needs_smollm2
@pytest.mark.parametrize(
    "config",
    [
        mpass.SparseConfig("a_shape", num_layers=31),
        mpass.SparseConfig("a_shape", num_heads=8),
        mpass.SparseConfig("a_shape", {3: ["dense"] * 10}),
    ],
)
def test_a_config_for_another_model_is_refused(config, tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "load_model", forbidden)
    file = tmp_path / "config.json"
    config.save(file)
    with pytest.raises(ConfigMismatchError):
        run_demo(DemoSettings(config=str(file)))


@needs_smollm2
def test_a_prompt_beyond_the_models_positions_is_refused(monkeypatch):
    monkeypatch.setattr(demo, "load_model", forbidden)
    with pytest.raises(OptionValueError, match="at most 8192"):
        run_demo(DemoSettings(length=8193))


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("vertical_slash", mpass.VerticalSlash()),
        ("vertical_slash(100, 200)", mpass.VerticalSlash(100, 200)),
        ("vertical_slash(slash_size=200)", mpass.VerticalSlash(slash_size=200)),
        ("block_sparse(5, block_size=128)", mpass.BlockSparse(5, 128)),
        (" dense ", mpass.Dense()),
    ],
)
def test_patterns_are_read_from_text(text, pattern):
    assert parse_pattern(text) == pattern
    assert parse_pattern(str(pattern)) == pattern


def run_main(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["mpass", *arguments])
    with pytest.raises(SystemExit) as left:
        main()
    return left.value.code, capsys.readouterr()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--pattern", "slash"],
        ["--length", "-1"],
        ["--model", "/no/such/model"],
        ["--text", "/no/such/text"],
        ["--output", "/no/such/folder/file.json"],
    ],
)
def test_the_command_refuses_bad_input_in_one_line(monkeypatch, capsys, arguments):
    code, printed = run_main(monkeypatch, capsys, "demo", *arguments)
    assert code == 2
    last = printed.err.strip().splitlines()[-1]
    assert last.startswith("mpass: ") and arguments[1] in last


def test_the_command_finds_the_refusal_inside_of_dynamos_error():
    from mpass.cli.app import user_error

    class Wrapper(Exception):
        inner_exception = OptionValueError("pattern", 1, "a name")

    assert isinstance(user_error(Wrapper()), MpassError)
    assert user_error(ValueError("a bug")) is None


def test_version_and_help_need_no_torch():
    code = (
        "import sys; from typer.testing import CliRunner; from mpass.cli.app import app\n"
        "runner = CliRunner()\n"
        "print(runner.invoke(app, ['--version']).output)\n"
        "help = runner.invoke(app, ['demo', '--help'])\n"
        "assert help.exit_code == 0 and '--pattern' in help.output\n"
        "assert 'torch' not in sys.modules"
    )
    printed = run_python("-c", code)
    assert printed.stdout.strip() == f"mpass {mpass.__version__}"


def test_patterns_are_listed_with_their_parameters():
    from typer.testing import CliRunner

    listed = CliRunner().invoke(app, ["patterns"])
    assert listed.exit_code == 0
    assert "vertical_slash" in listed.output and "top_k" in listed.output
