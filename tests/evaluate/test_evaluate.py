"""The evaluation: scores that can fail, gates, runs that go on, a model in every pattern."""

from __future__ import annotations

import json
from typing import ClassVar
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from mpass.errors import OptionValueError, UnknownPatternError
from mpass.evaluate import run
from mpass.evaluate import runner as runner_module
from mpass.evaluate.charts import write_plots
from mpass.evaluate.plan import (
    DENSE,
    GRID,
    PERPLEXITY,
    SLIDING,
    Plan,
    check_plan,
    list_inputs,
    read_lines,
)
from mpass.evaluate.run import evaluate
from mpass.evaluate.runner import Runner, mean_density, window_layers
from mpass.evaluate.samples import fit
from mpass.evaluate.score import compare_all, compare_losses, loose_score, strict_score
from mpass.evaluate.summary import judge, summarize
from mpass.evaluate.tables import render_summaries
from mpass.evaluate.tasks import make_puzzle
from tests.helpers.haystacks import CharTokenizer
from tests.helpers.requirements import needs_smollm2


class TableModel:
    """lm_head of 128 tokens: hidden states are the logits themselves."""

    config = type("Config", (), {"get_text_config": lambda self: self})()

    def get_output_embeddings(self):
        return lambda hidden: hidden


def knowing(tokens):
    """Hidden states that predict exactly the tokens that follow."""
    following = torch.roll(tokens, -1, dims=1)
    return 10.0 * torch.nn.functional.one_hot(following, 128).float()


def test_strict_score_counts_an_answer_only_if_every_token_is_right(haystack):
    sample = fit(make_puzzle("niah_multivalue", 0, haystack), CharTokenizer(), 3000)
    hidden = knowing(sample.tokens)
    hidden[0, sample.prompt - 1] = 0.0  # what stands between prompt and answer does not count
    assert strict_score(TableModel(), hidden, sample) == 1.0
    start, stop = sample.spans[1]
    hidden[0, (start + stop) // 2] = 0.0  # one wrong digit
    assert strict_score(TableModel(), hidden, sample) == 0.75
    hidden[0, sample.spans[0][0] - 1] = 0.0  # and the first token of another
    assert strict_score(TableModel(), hidden, sample) == 0.5
    assert strict_score(TableModel(), torch.zeros_like(hidden), sample) == 0.0


@pytest.mark.parametrize(
    ("generated", "score"), [("They are ALPHA, and beta.", 1.0), ("alpha beth", 0.5), ("", 0.0)]
)
def test_the_looser_score_looks_for_the_answers_anywhere(generated, score):
    assert loose_score(generated, ("Alpha", "beta")) == score


@pytest.mark.parametrize("length", [5, 513, 1300])
def test_losses_are_those_of_all_logits_at_once(length):
    generator = torch.Generator().manual_seed(length)
    dense = torch.randn(1, length, 128, generator=generator)
    sparse = dense + 0.3 * torch.randn(1, length, 128, generator=generator)
    tokens = torch.randint(128, (1, length), generator=generator)
    got = compare_losses(TableModel(), dense, sparse, tokens)
    a, b = dense[0, :-1].double().log_softmax(-1), sparse[0, :-1].double().log_softmax(-1)
    nll = torch.nn.functional.nll_loss
    assert got.dense == pytest.approx(float(nll(a, tokens[0, 1:])), rel=1e-5)
    assert got.sparse == pytest.approx(float(nll(b, tokens[0, 1:])), rel=1e-5)
    expected = torch.nn.functional.kl_div(b, a, log_target=True, reduction="batchmean")
    assert got.divergence == pytest.approx(float(expected), rel=1e-4)
    assert got.agreement == pytest.approx(float((a.argmax(-1) == b.argmax(-1)).double().mean()))
    last = (length - 1) // 4
    assert got.sparse_quarters[3] == pytest.approx(
        float(nll(b[-last:], tokens[0, 1:][-last:])), rel=1e-5
    )
    count = min(16, length - 1)
    parts = zip(a.tensor_split(count), tokens[0, 1:].tensor_split(count), strict=True)
    expected = [float(nll(*part)) for part in parts]
    assert got.dense_positions == pytest.approx(expected, rel=1e-5)
    gaps = (a - b).gather(-1, tokens[0, 1:, None])[:, 0]
    assert got.scored == len(gaps)
    for error, part in ((got.error, gaps), (got.last_error, gaps.tensor_split(4)[-1])):
        assert error == pytest.approx(float(part.std(correction=0)) / len(part) ** 0.5, rel=1e-4)


def test_scored_positions_are_spread_evenly_and_stand_for_all():
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(1, 4097, 128, generator=generator)
    sparse = dense + 0.3 * torch.randn(1, 4097, 128, generator=generator)
    tokens = torch.randint(128, (1, 4097), generator=generator)
    whole = compare_losses(TableModel(), dense, sparse, tokens)
    part, other = compare_all(TableModel(), dense, [sparse, dense], tokens, 1024)
    rows = torch.arange(0, 4096, 4)
    nll = -sparse[0].double().log_softmax(-1)[rows].gather(-1, tokens[0, rows + 1, None])[:, 0]
    assert part.scored == 1024
    assert part.sparse == pytest.approx(float(nll.mean()), rel=1e-5)
    assert part.sparse_quarters[-1] == pytest.approx(float(nll[-256:].mean()), rel=1e-5)
    assert abs(part.sparse - part.dense - (whole.sparse - whole.dense)) < 3 * part.error
    assert other.sparse == other.dense == part.dense and other.agreement == 1.0
    assert compare_all(TableModel(), dense, [sparse], tokens, 5000) == [whole]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tasks": ("niah_single_9",)}, OptionValueError),
        ({"patterns": ("slash",)}, UnknownPatternError),
        ({"lengths": (16,)}, OptionValueError),
        ({"samples": 0}, OptionValueError),
        ({"inner_backend": "gcc"}, OptionValueError),
    ],
)
def test_a_bad_plan_is_refused(change, error, tmp_path):
    with pytest.raises(error):
        check_plan(Plan(**change))
    with pytest.raises(error):
        evaluate(Plan(**change), tmp_path / "lines.jsonl")
    assert not list(tmp_path.iterdir())


def test_inputs_are_listed_length_by_length_and_the_grid_by_depth():
    plan = Plan(tasks=("passkey", GRID), lengths=(512, 1024), samples=2)
    listed = list(list_inputs(plan))
    assert [item[1] for item in listed] == [512] * 12 + [1024] * 12
    assert {item[3] for item in listed if item[0] == GRID} == {0.0, 0.25, 0.5, 0.75, 1.0}


def line(task, pattern, **figures):
    return {
        "task": task,
        "text": "code",
        "length": 512,
        "pattern": pattern,
        "density": 0.5,
        **figures,
    }


def losses(pattern, sparse, last):
    parts = {
        f"{kind}_{name}": (2.0, 2.0, 2.0, value)
        for name in ("quarters", "positions")
        for kind, value in (("dense", 1.5), ("sparse", last))
    }
    return line(
        PERPLEXITY, pattern, dense=2.0, sparse=sparse, divergence=0.1, agreement=0.9, **parts
    )


def test_a_task_that_dense_cannot_do_is_shown_but_not_counted():
    lines = [
        line("number", DENSE, score=0.0, loose=0.0),
        line("number", "a_shape", score=0.0, loose=1.0),
        line("passkey", DENSE, score=1.0, loose=1.0),
        line("passkey", "a_shape", score=0.5, loose=1.0),
        losses(DENSE, 2.0, 1.5),
        losses("a_shape", 2.25, 1.75),
    ]
    summaries = {item.task: item for item in summarize(lines)}
    assert not summaries["number"].counted and summaries["passkey"].counted
    assert (summaries["passkey"].score, summaries["passkey"].loose) == (0.5, 1.0)
    assert summaries[PERPLEXITY].score == pytest.approx(0.25)
    assert summaries[PERPLEXITY].last_quarter == pytest.approx(0.25)
    (verdict,) = judge(summaries.values())
    assert verdict.retention == 0.5 and not verdict.passes


def test_of_sliding_windows_the_last_quarter_is_scored():
    lines = [losses(name, 2.25, 1.75) | {"task": SLIDING} for name in (DENSE, "a_shape")]
    (summary,) = summarize(lines)
    assert (summary.dense, summary.score) == (1.5, 0.25)


@pytest.mark.parametrize(
    ("loss", "last", "found", "passes"),
    [
        (0.009, 0.009, 1.0, True),
        (0.011, 0.009, 1.0, False),
        (0.009, 0.011, 1.0, False),
        (0.009, 0.009, 0.9, False),
    ],
)
def test_a_default_must_pass_both_gates(loss, last, found, passes):
    lines = [
        line("passkey", DENSE, score=1.0),
        line("passkey", "union", score=found),
        line("niah_single_1", DENSE, score=0.5),
        line("niah_single_1", "union", score=1.0),  # does not make up for another task
        losses(DENSE, 2.0, 1.5),
        losses("union", 2.0 + loss, 1.5 + last),
    ]
    (verdict,) = judge(summarize(lines))
    assert verdict.passes is passes


def test_tables_show_strict_and_decoded_scores_and_bracket_what_is_not_counted():
    lines = [
        line("number", DENSE, score=0.0, loose=0.0),
        line("number", "union", score=0.0, loose=0.0),
        line("passkey", DENSE, score=1.0, loose=1.0),
        line("passkey", "union", score=0.0, loose=1.0),
        losses(DENSE, 2.0, 1.5),
        losses("union", 2.01, 1.5),
    ]
    console = Console(width=80)
    with console.capture() as captured:
        console.print(render_summaries(summarize(lines)))
    shown = captured.get()
    assert "100% -> 0%" in shown and "100% -> 100%" in shown and "(0% -> 0%)" in shown
    assert "+0.0100" in shown and "fails" in shown and "…" not in shown


def test_what_was_not_measured_does_not_pass():
    lines = [losses(DENSE, 2.0, 1.5), losses("union", 2.0, 1.5)]
    (verdict,) = judge(summarize(lines))
    assert verdict.retention is None and not verdict.passes


def test_plots_are_written_of_what_there_is(tmp_path):
    lines = [losses(DENSE, 2.0, 1.5), losses("union", 2.02, 1.5)]
    assert [path.name for path in write_plots(tmp_path, lines, summarize(lines))] == [
        "density_loss.svg",
        "loss_by_position.svg",
    ]
    for depth in (0.0, 0.5, 1.0):
        for length in (512, 1024):
            for name, score in ((DENSE, 1.0), ("union", depth)):
                lines.append(line(GRID, name, score=score, depth=depth) | {"length": length})
    paths = write_plots(tmp_path, lines, summarize(lines))
    assert len(paths) == 4
    for path in paths:
        ElementTree.parse(path)  # well-formed
    grid = ElementTree.parse(tmp_path / "needle_grid.svg").getroot()
    texts = [element.text for element in grid.iter() if element.tag.endswith("text")]
    assert texts.count("100%") == 6 + 2 and texts.count("50%") == 2 and texts.count("0%") == 2
    assert {"depth 0%", "depth 50%", "depth 100%", "512", "1024"} <= set(texts)


class CountingRunner:
    """Stands where the model runs: figures without a model, and what was asked for."""

    asked: ClassVar[list[str]] = []

    def __init__(self, model, tokenizer, plan):
        pass

    def measure(self, sample, names):
        for name in names:
            self.asked.append(name)
            yield name, {"density": 1.0, "score": 1.0}


def test_a_stopped_run_goes_on_where_it_was_cut_off(tmp_path, monkeypatch):
    class Config:
        max_position_embeddings = 8192

        def get_text_config(self):
            return self

    monkeypatch.setattr(run, "Runner", CountingRunner)
    monkeypatch.setattr(run, "load_config", lambda *arguments, **options: Config())
    monkeypatch.setattr(run, "load_model", lambda *arguments, **options: (None, CharTokenizer()))
    file = tmp_path / "lines.jsonl"
    file.touch()  # an empty file has no line that was cut off
    plan = Plan(tasks=("passkey",), lengths=(1024,), patterns=("a_shape",), samples=3)
    first = evaluate(plan, file)
    assert CountingRunner.asked == 3 * [DENSE, "a_shape"]
    assert [json.loads(text) for text in file.read_text().splitlines()] == first

    CountingRunner.asked.clear()
    assert evaluate(plan, file) == first and CountingRunner.asked == []
    file.write_text(file.read_text()[:-40])
    assert len(read_lines(file)) == 5
    assert evaluate(plan, file) == first and CountingRunner.asked == ["a_shape"]
    CountingRunner.asked.clear()
    assert evaluate(plan, file) == first and CountingRunner.asked == []


@pytest.fixture(scope="module")
def windowed_model():
    """Layers 0, 1 and 3 see 128 tokens, layer 2 sees everything."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    kinds = ["sliding_attention"] * 4
    kinds[2] = "full_attention"
    config = transformers.Gemma3TextConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        sliding_window=128,
        layer_types=kinds,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    return transformers.Gemma3ForCausalLM(config).eval()


class TextTokenizer(CharTokenizer):
    def decode(self, tokens):
        return "".join(map(chr, tokens.tolist()))


def test_windows_stay_windows_and_density_is_that_of_the_other_layers(windowed_model, monkeypatch):
    name = "a_shape(64, 64)"
    runner = Runner(windowed_model, TextTokenizer(), Plan(patterns=(name,)))
    tokens = torch.randint(128, (1, 1024), generator=torch.Generator().manual_seed(0))
    calls = []
    monkeypatch.setattr(
        runner_module,
        "mean_density",
        lambda model, log: calls.extend(log) or mean_density(model, log),
    )
    _, density = runner.prefill(name, tokens)
    assert window_layers(windowed_model) == (0, 1, 3)
    assert [float(call.density.min()) for call in calls if call.layer != 2] == [1.0] * 3
    (full,) = (call for call in calls if call.layer == 2)
    assert density == pytest.approx(float(full.density.mean())) and density < 0.3


def test_dense_attention_with_windows_is_the_models_own(windowed_model):
    runner = Runner(windowed_model, TextTokenizer(), Plan(patterns=()))
    tokens = torch.randint(128, (1, 700), generator=torch.Generator().manual_seed(0))
    output, density = runner.prefill(DENSE, tokens)
    with torch.no_grad():
        expected = windowed_model.get_decoder()(tokens).last_hidden_state
    assert density == 1.0
    torch.testing.assert_close(output.last_hidden_state, expected, rtol=1e-4, atol=1e-4)


def test_all_lengths_share_a_graph_and_decoding_is_dense(windowed_model, haystack):
    name = "a_shape(64, 64)"
    runner = Runner(windowed_model, TextTokenizer(), Plan(patterns=(name,)))
    sample = fit(make_puzzle("passkey", 0, haystack), CharTokenizer(), 900)
    figures = dict(runner.measure(sample, (DENSE, name)))
    with torch.no_grad():
        expected = windowed_model.generate(
            sample.tokens[:, : sample.prompt], max_new_tokens=6 + 16, do_sample=False
        )
    written = TextTokenizer().decode(expected[0, sample.prompt :])
    assert figures[DENSE]["generated"] == written
    assert figures[DENSE]["density"] == 1.0 and 0.1 < figures[name]["density"] < 0.4
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    runner.prefill(name, sample.tokens[:, :700])
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs


@needs_smollm2
@pytest.mark.slow
def test_smollm2_finds_needles_that_a_narrow_window_loses(tmp_path):
    plan = Plan(
        tasks=("niah_single_1", PERPLEXITY),
        lengths=(1024,),
        patterns=("a_shape(16, 64)",),
        samples=2,
    )
    needle, perplexity = sorted(
        summarize(evaluate(plan, tmp_path / "lines.jsonl")), key=lambda item: item.task
    )
    assert needle.dense == 1.0 and needle.score == 0.0
    assert perplexity.score > 0.02
    assert 0 < needle.density < 0.4
