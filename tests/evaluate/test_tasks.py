"""Inputs of the evaluation: deterministic, of an exact length, as the tasks are defined."""

from __future__ import annotations

import re

import pytest

from mpass.errors import OptionValueError
from mpass.evaluate.plan import PERPLEXITY, SLIDING
from mpass.evaluate.questions import read_documents
from mpass.evaluate.run import make_sample
from mpass.evaluate.samples import Puzzle, encode_answers, fit
from mpass.evaluate.tasks import TASKS, grid_puzzle, make_puzzle
from tests.helpers.haystacks import CharTokenizer, text_of


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("length", [2500, 4001])
def test_samples_have_the_exact_length_and_end_with_the_answers(task, length, haystack):
    sample = fit(make_puzzle(task, 3, haystack), CharTokenizer(), length)
    assert sample.tokens.shape == (1, length)
    text = text_of(sample)
    assert text.endswith(" " + ", ".join(sample.answers))
    for answer, (start, stop) in zip(sample.answers, sample.spans, strict=True):
        assert text[start:stop] == answer
    assert text[: sample.prompt] == text[: sample.spans[0][0] - 1], "the space is no answer"


class JoiningTokenizer(CharTokenizer):
    """One token per word, its space included, as byte-pair tokenizers have it for letters."""

    def __call__(self, text, *, add_special_tokens, verbose):
        return {"input_ids": [hash(word) for word in re.findall(r"\s?\S+|\s", text)]}


def test_a_space_that_is_one_token_with_the_answer_is_part_of_it():
    tokens, spans = encode_answers(JoiningTokenizer(), ("alpha", "beta"))
    assert (len(tokens), spans) == (3, [(0, 1), (2, 3)])
    tokens, spans = encode_answers(CharTokenizer(), ("alpha", "beta"))
    assert (len(tokens), spans) == (12, [(1, 6), (8, 12)])


@pytest.mark.parametrize("task", TASKS)
def test_tasks_are_the_same_for_a_seed_and_differ_between_seeds(task, haystack):
    texts = [
        text_of(fit(make_puzzle(task, seed, haystack), CharTokenizer(), 3000)) for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


@pytest.mark.parametrize("task", [task for task in TASKS if task.startswith("niah")])
def test_the_needles_are_in_the_haystack(task, haystack):
    sample = fit(make_puzzle(task, 0, haystack), CharTokenizer(), 6000)
    prompt = text_of(sample)[: sample.prompt]
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
        prompt = text_of(sample)[: sample.prompt]
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
