"""Questions about people of whom a long text tells, and what they are answered from."""

from __future__ import annotations

import pytest
import torch

import mpass
from mpass.evaluate.tasks import make_haystack
from tests.helpers.haystacks import CharTokenizer
from tests.helpers.paths import ROOT

HAYSTACK = make_haystack("text", "The sky was grey. A bell rang twice. Nobody came. " * 20)


@pytest.fixture
def questions(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import cache_questions

    return cache_questions


@pytest.mark.parametrize("seed", range(4))
def test_one_of_the_answers_is_told_of_whom_is_asked_and_no_other_is(questions, seed):
    prompt, answer, values = questions.make("people", seed, HAYSTACK, CharTokenizer(), 3000)
    text = "".join(map(chr, prompt[0].tolist()))
    told, _, question = text.rpartition("Question: ")
    assert len(set(values)) == 12 and answer in values
    asked = next(name for name in questions.NAMES if name in question)
    story = questions.FACTS[sorted(questions.FACTS)[seed % 4]][0]
    for value in values:
        assert (story.format(name=asked, value=value) in told) == (value == answer)
        assert (f" {value}" in told) == (value == answer) and f" {value}" not in question
    assert sum(name in told for name in questions.NAMES) == 4
    assert prompt.shape[1] == 3000 - len(f" {answer}")


def test_the_likelihood_of_an_answer_is_that_of_its_tokens_one_after_another(questions):
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 50}
    config = transformers.LlamaConfig(**sizes, num_attention_heads=2, num_key_value_heads=1)
    model = transformers.LlamaForCausalLM(config).eval()
    tokens = torch.randint(0, 50, (1, 30))
    answers = [[7], [3, 4, 5], [8, 1]]
    with torch.no_grad():
        cache = model(tokens[:, :-1]).past_key_values
        kept = torch.arange(29).int().expand(1, 1, -1)
        mpass.compress(cache, mpass.KVSelection({0: kept, 1: kept}, {0: 29, 1: 29}))
        found = questions.likelihoods(model, cache, tokens[:, -1:], answers)
        for value, answer in zip(found, answers, strict=True):
            logits = model(torch.cat([tokens, torch.tensor([answer])], 1)).logits[0, 29:-1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).mean()
            assert abs(value - float(expected)) < 1e-5


@pytest.mark.parametrize("rule", ["recent", "random"])
def test_rules_by_hand_keep_as_many_different_keys_as_they_may(questions, rule):
    from cut_caches import by_hand

    like = mpass.KVSelection({0: torch.zeros(1, 3, 4)}, {0: 500})
    kept = by_hand(rule, 500, 100, like).positions[0]
    assert kept.shape == (1, 3, 100) and (kept.diff(dim=-1) > 0).all()
    assert kept.min() >= 0 and kept.max() == 499
