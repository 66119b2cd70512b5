"""Floors of accuracy on a real model: the default must hold them, a broken estimator must not.

SmolLM2-135M over 3072 tokens: increase of the loss on Python's standard library, and one needle in
1536, scored strictly. `mpass eval` measures more; this is what every change is held against.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpass.evaluate.plan import DENSE, Plan
from mpass.evaluate.run import make_sample
from mpass.evaluate.runner import Runner, sparse_options
from mpass.evaluate.score import compare_losses, strict_score
from mpass.evaluate.tasks import make_haystack
from mpass.lowering.index import BLOCK, SparseIndex
from mpass.models.load import load_model
from mpass.models.prefill import compile_body
from mpass.models.texts import find_text
from mpass.patterns.union import Union
from tests.helpers.requirements import needs_smollm2
from tests.helpers.rotation import on_its_day

LENGTH, NEEDLE_LENGTH = 3072, 1536
MOST_LOSS = 0.01
"""Nats per token over dense, over the window and over its last quarter."""

pytestmark = [
    needs_smollm2,
    on_its_day("accuracy floors"),
    pytest.mark.xdist_group("accuracy_floors"),
]


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """What the floors are about. found: the needle's strict score, 0 or 1."""

    density: float
    loss: float
    last_quarter: float
    found: float

    def holds(self) -> bool:
        return max(self.loss, self.last_quarter) <= MOST_LOSS and self.found == 1.0


class Bench:
    """The model, its dense prediction of a text, and a needle."""

    def __init__(self):
        model, tokenizer = load_model("smollm2", dtype=torch.bfloat16)
        self.runner = Runner(model, tokenizer, Plan(generate=False))
        # Dense fallbacks off: what is tested is what was selected.
        options = {"min_seq_len": 0, "dense_above": 1.0, "inner_backend": "eager"}
        options |= sparse_options(model, "union")
        self.runner.forwards["union"] = compile_body(model, "minference", options)
        text = find_text("code").read()
        haystack = make_haystack("code", text)
        self.text, self.needle = (
            make_sample(task, length, 0, None, text, haystack, tokenizer)
            for task, length in (("perplexity", LENGTH), ("passkey", NEEDLE_LENGTH))
        )
        self.dense = self.runner.prefill(DENSE, self.text.tokens)[0].last_hidden_state

    def measure(self) -> Accuracy:
        output, density = self.runner.prefill("union", self.text.tokens)
        losses = compare_losses(
            self.runner.model, self.dense, output.last_hidden_state, self.text.tokens
        )
        output, _ = self.runner.prefill("union", self.needle.tokens)
        return Accuracy(
            density=density,
            loss=losses.sparse - losses.dense,
            last_quarter=losses.sparse_quarters[-1] - losses.dense_quarters[-1],
            found=strict_score(self.runner.model, output.last_hidden_state, self.needle),
        )


@pytest.fixture(scope="module")
def bench():
    return Bench()


@pytest.fixture(scope="module")
def default(bench):
    return bench.measure()


def at_random(index: SparseIndex) -> SparseIndex:
    """As many blocks per query block and as many columns, but others.

    The diagonal block stays: the format asks for it.
    """
    generator = torch.Generator().manual_seed(0)
    rows, width = index.block_index.shape[-2:]
    scores = torch.rand(*index.block_count.shape, rows, generator=generator)
    place = torch.arange(rows)
    scores[..., place, place] = 2.0
    after = place > place[:, None]
    order = scores.masked_fill(after, -1.0).argsort(descending=True)[..., :width]
    blocks = torch.zeros_like(index.block_index)
    blocks[..., : order.shape[-1]] = sorted_first(order, index.block_count)
    columns = torch.rand(*index.column_count.shape, rows * BLOCK, generator=generator).argsort()
    columns = columns[..., : index.column_index.shape[-1]]
    return dataclasses.replace(
        index, block_index=blocks, column_index=sorted_first(columns, index.column_count)
    )


def sorted_first(entries, counts):
    """The first `counts` of the entries [..., n] in ascending order, then zeros; int32."""
    kept = torch.arange(entries.shape[-1]) < counts[..., None]
    ascending = entries.masked_fill(~kept, 1 << 30).sort().values
    return ascending.masked_fill(~kept, 0).int().contiguous()


def test_the_default_keeps_the_loss_and_finds_the_needle(default):
    assert default.density < 0.5, "too dense to say anything about sparsity"
    assert default.holds(), default


@pytest.mark.slow
def test_a_random_choice_of_as_much_fails_the_floors(bench, default, monkeypatch):
    estimate = Union.estimate
    monkeypatch.setattr(
        Union, "estimate", lambda *arguments, **options: at_random(estimate(*arguments, **options))
    )
    broken = bench.measure()
    # Random columns seldom stand in selected blocks, so that even more is computed.
    assert broken.density >= default.density
    assert broken.loss > 10 * MOST_LOSS and broken.last_quarter > 10 * MOST_LOSS, broken
    assert broken.found == 0.0
    assert not broken.holds()
