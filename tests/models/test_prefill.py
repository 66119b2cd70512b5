"""Prefills: what they predict of a text, and continuing from one."""

from __future__ import annotations

import pytest
import torch

from mpass.models.load import load_model
from mpass.models.prefill import continue_text, predict, prefill
from mpass.models.texts import find_text, load_tokens
from tests.helpers.requirements import needs_smollm2


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
def test_continuation_runs_the_given_forward_and_leaves_the_model_as_it_was():
    model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
    tokens = load_tokens(find_text("code").read(), tokenizer, 64)
    lengths = []

    def forward(**arguments):
        lengths.append(arguments["input_ids"].shape[1])
        return type(model.model).forward(model.model, **arguments)

    output = prefill(forward, tokens)
    assert len(continue_text(model, forward, output, tokens, 3)) == 3
    assert lengths == [64, 1, 1]
    assert "forward" not in vars(model.model)
