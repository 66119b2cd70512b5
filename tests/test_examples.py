"""The programs in examples/ run as they stand."""

from __future__ import annotations

import runpy

import pytest
import torch

import mpass
from tests.helpers.paths import ROOT
from tests.helpers.toys import tiny_llama

EXAMPLES = ROOT / "examples"
WORDS = [f"w{i}" for i in range(61)]


def save_tiny_llama(folder):
    """A tiny Llama with random weights and a tokenizer of one token per word, in a folder."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {word: i for i, word in enumerate(["<eos>", "<unk>", "<pad>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token="<eos>", unk_token="<unk>", pad_token="<pad>"
    )
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": len(vocabulary), "max_position_embeddings": 4096}
    tiny_llama(**sizes, eos_token_id=None).save_pretrained(folder)


@pytest.fixture
def llama_folder(tmp_path):
    save_tiny_llama(tmp_path)
    return tmp_path


def test_prefill_example_runs_sparse_and_generates(llama_folder, tmp_path, capsys):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text(" ".join(WORDS[(i * i) % len(WORDS)] for i in range(2100)))
    torch._dynamo.reset()
    known = {id(report) for report in mpass.reports()}
    runpy.run_path(str(EXAMPLES / "prefill.py"))["main"](str(llama_folder), str(prompt))
    prefill = next(report for report in mpass.reports() if id(report) not in known)
    assert [site.status for site in prefill.sites] == ["sparse", "sparse"]
    assert [site.layer for site in prefill.sites] == [0, 1]
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("next: ")
    assert len(printed[-1].split()) == 16
