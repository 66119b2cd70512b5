"""A plan per attention and range of steps: its rules, its file, and how it is searched."""

from __future__ import annotations

import json

import pytest
import torch

import mpass
from mpass.errors import ArgumentError, CalibrationError, ConfigFileError
from mpass.lowering.denoising_plan import Span
from tests.helpers.denoising_model import OPTIONS, TOKENS, Model, distance, noise
from tests.helpers.truth import random_attention

STEPS = 10

PLAN = mpass.DenoisingPlan(
    STEPS,
    (
        (Span(0, 4, 1), Span(4, 10, 3, "output")),
        (Span(0, 10, 4, "residual"),),
    ),
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.fixture(scope="module")
def compiled(model):
    torch._dynamo.reset()
    return torch.compile(model, backend="minference", options=OPTIONS)


@torch.no_grad()
def sample(model, run=None, seed=1, steps=STEPS):
    x = noise(seed=seed)
    for _ in run.over(range(steps)) if run else range(steps):
        x = x - 0.05 * model(x)
    return x


def test_each_attention_is_whole_where_its_spans_say():
    whole = [[s for s in range(STEPS) if PLAN.at(s, place).full] for place in range(2)]
    kept = [[s for s in range(STEPS) if PLAN.at(s, place).kept] for place in range(2)]
    assert whole == [[0, 1, 2, 3, 4, 7], [0, 4, 8]]
    assert kept == [[4, 7], [0, 4, 8]]
    assert PLAN.at(5, 0).keep == "output" and PLAN.at(5, 1).keep == "residual"
    assert PLAN.at(STEPS, 0).full and not PLAN.at(STEPS, 0).kept


def test_a_run_follows_its_plan(model, compiled):
    dense = sample(model)
    with mpass.denoising(STEPS, plan=PLAN) as run, mpass.record() as log:
        out = sample(compiled, run)
    shares = [float(call.density.mean()) for call in log.calls]
    for place in range(2):
        for step, share in enumerate(shares[place::2]):
            rule = PLAN.at(step, place)
            between = share == 0 if rule.keep == "output" else 0 < share < 1
            assert share == 1 if rule.full else between, (place, step)
    assert 0 < distance(out, dense) < 0.1


def test_a_plan_of_one_kind_is_the_schedule_of_that_kind(compiled):
    plan = mpass.DenoisingPlan(STEPS, ((Span(0, STEPS, 4),),) * 2)
    results = []
    for given in ({"plan": plan}, {"full": 1, "every": 4}):
        with mpass.denoising(STEPS, **given) as run:
            results.append(sample(compiled, run))
    assert torch.equal(*results)


def test_a_plan_is_read_as_it_was_written(tmp_path):
    PLAN.save(tmp_path / "plan.json")
    assert mpass.DenoisingPlan.load(tmp_path / "plan.json") == PLAN


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"format": "other"}, "no mpass-denoising-plan"),
        ({"version": 2}, "version 1"),
        ({"attentions": [[{"start": 0, "stop": 9, "every": 1}]]}, "from step 0 to 10"),
        ({"attentions": [[{"start": 0, "stop": 10, "every": 0}]]}, "every is 0"),
        ({"attentions": [[{"start": 0}]]}, "stop"),
        ({"attentions": 3}, "attentions"),
        (None, "Expecting"),
    ],
    ids=str,
)
def test_a_file_that_holds_no_plan_is_refused(tmp_path, change, words):
    path = tmp_path / "plan.json"
    PLAN.save(path)
    path.write_text("{" if change is None else json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigFileError, match=words):
        mpass.DenoisingPlan.load(path)


def test_a_plan_of_other_steps_or_too_few_attentions_is_refused(compiled):
    with (
        pytest.raises(ArgumentError, match="plan is 'of 10 steps'"),
        mpass.denoising(20, plan=PLAN),
    ):
        pass
    short = mpass.DenoisingPlan(STEPS, PLAN.attentions[:1])
    with (
        mpass.denoising(STEPS, plan=short) as run,
        pytest.raises(ArgumentError, match="for this very model"),
    ):
        sample(compiled, run)


def cells_of(plan, share):
    """Cells that a plan computes, in those of dense attention."""
    total = 0.0
    for place in range(len(plan.attentions)):
        for step in range(plan.steps):
            rule = plan.at(step, place)
            total += 1.0 if rule.full else share * (rule.keep == "residual")
    return total / (plan.steps * len(plan.attentions))


def test_a_searched_plan_keeps_its_budget_and_is_better_than_alike_for_all(model, compiled):
    def calibrate(run):
        return sample(compiled, run, seed=2)

    q, k, _ = random_attention(1, 2, 2, TOKENS, head_dim=16)
    share = float(mpass.density(q, k, pattern="a_shape(0, 64)", is_causal=False).mean())
    numbers = {"ranges": 2, "every": (2, 3, 5)}
    plan = mpass.search_denoising(calibrate, STEPS, cells=0.75, **numbers)
    assert len(plan.attentions) == 2
    assert cells_of(plan, share) <= 0.75
    assert plan == mpass.search_denoising(calibrate, STEPS, cells=0.75, **numbers)
    every = mpass.search_denoising(calibrate, STEPS, cells=1.0, **numbers)
    assert all(every.at(s, place).full for s in range(STEPS) for place in range(2))

    dense = sample(model)
    errors = []
    # Whole at 5 of 10 steps and so many cells between: no fewer than the plan has.
    alike = {"full": 1, "every": 2, "keep": "output"}
    assert cells_of(plan, share) >= 0.5
    for given in ({"plan": plan}, alike):
        with mpass.denoising(STEPS, **given) as run:
            errors.append(distance(sample(compiled, run), dense))
    assert errors[0] < errors[1]


def test_searching_leaves_samples_dense(model, compiled):
    found = []
    mpass.search_denoising(lambda run: found.append(sample(compiled, run)), STEPS, cells=0.8)
    assert (found[0] - sample(model)).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cells": 0.01}, r"cells is 0.01; allowed: 0\.\d+ or more"),
        ({"cells": 2}, "0 < cells <= 1"),
        ({"ranges": 10}, "<= the other steps, 9"),
        ({"full": 10}, "< steps, 10"),
        ({"full": 0}, "full is 0"),
        ({"ranges": 0}, "ranges is 0"),
        ({"every": (1, 2)}, ">= 2"),
        ({"every": ()}, ">= 2"),
    ],
    ids=str,
)
def test_what_cannot_be_searched_is_told(compiled, settings, words):
    with pytest.raises(ArgumentError, match=words):
        mpass.search_denoising(lambda run: sample(compiled, run), STEPS, **settings)


def test_a_model_without_the_option_is_told(model):
    with pytest.raises(CalibrationError, match=r"options=.'denoising'"):
        mpass.search_denoising(lambda run: sample(model, run), STEPS)
