"""The evaluation's dense figures against running the model by hand: transformers alone."""

from __future__ import annotations

import pytest
import torch

from mpass.evaluate.plan import DENSE, Plan
from mpass.evaluate.run import make_sample
from mpass.evaluate.runner import Runner
from mpass.evaluate.tasks import make_haystack
from mpass.models.load import load_model
from mpass.models.texts import find_text
from tests.helpers.requirements import needs_smollm2

LENGTH = 512

pytestmark = [needs_smollm2, pytest.mark.xdist_group("dense_by_hand")]


@pytest.fixture(scope="module")
def evaluation():
    """A model in fp32, its runner, and a function that makes samples of a task."""
    model, tokenizer = load_model("smollm2", dtype=torch.float32)
    text = find_text("code").read()
    haystack = make_haystack("code", text)

    def sample_of(task, seed=0):
        return make_sample(task, LENGTH, seed, None, text, haystack, tokenizer)

    plan = Plan(patterns=(), generate=False, dtype="fp32")
    return model, tokenizer, Runner(model, tokenizer, plan), sample_of


def test_dense_loss_is_that_of_the_model_itself(evaluation):
    model, _, runner, sample_of = evaluation
    tokens = sample_of("perplexity").tokens
    ((_, figures),) = runner.measure(sample_of("perplexity"), [DENSE])
    with torch.no_grad():
        output = model(input_ids=tokens, labels=tokens)
    assert figures["dense"] == pytest.approx(float(output.loss), abs=1e-4)
    # Of 511 predictions the last quarter has 127.
    by_hand = torch.nn.functional.cross_entropy(output.logits[0, -128:-1], tokens[0, -127:])
    assert figures["dense_quarters"][-1] == pytest.approx(float(by_hand), abs=1e-4)


@pytest.mark.parametrize("task", ["niah_single_1", "passkey"])
def test_a_needle_is_found_strictly_where_greedy_decoding_writes_it(evaluation, task):
    model, tokenizer, runner, sample_of = evaluation
    sample = sample_of(task)
    ((start, stop),) = sample.spans
    ((_, figures),) = runner.measure(sample, [DENSE])
    with torch.no_grad():
        written = model.generate(
            sample.tokens[:, :start], max_new_tokens=stop - start, do_sample=False
        )
    expected = torch.equal(written[0, start:], sample.tokens[0, start:stop])
    assert figures["score"] == float(expected)
    assert sample.answers[0] in tokenizer.decode(sample.tokens[0, start:stop])
