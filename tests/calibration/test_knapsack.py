"""What the offline search chooses from and by: candidates, weights, and the knapsack's optimum."""

from __future__ import annotations

import itertools

import pytest
import torch

import mpass
from mpass.calibration.candidates import default_candidates
from mpass.calibration.knapsack import choose_under_budget, choose_under_loss
from mpass.calibration.predict import input_weights
from mpass.calibration.probe import as_input
from mpass.calibration.settings import Settings
from mpass.errors import BudgetError
from mpass.evaluate.samples import Sample
from mpass.patterns.base import registered_patterns
from tests.helpers.calibration_cases import inputs


@pytest.mark.parametrize("seed", range(10))
def test_the_knapsack_is_solved_exactly(seed):
    torch.manual_seed(seed)
    costs = torch.randint(1, 9, (5, 4)).double()
    losses = torch.rand(5, 4, dtype=torch.float64)
    budget = float(costs.amin(1).sum()) + seed + 0.1
    picks = list(itertools.product(range(4), repeat=5))
    sums = [
        (
            sum(float(losses[h, c]) for h, c in enumerate(p)),
            sum(costs[h, c] for h, c in enumerate(p)),
        )
        for p in picks
    ]
    chosen = choose_under_budget(losses, costs, budget)
    heads = torch.arange(5)
    assert float(costs[heads, chosen].sum()) <= budget
    best = min(loss for loss, cost in sums if cost <= budget)
    assert float(losses[heads, chosen].sum()) == pytest.approx(best)

    most = float(losses.amin(1).sum()) * 1.5
    chosen = choose_under_loss(losses, costs, most)
    assert float(losses[heads, chosen].sum()) <= most
    assert float(costs[heads, chosen].sum()) == min(cost for loss, cost in sums if loss <= most)


def test_an_impossible_budget_is_refused_with_what_is_needed():
    costs = torch.tensor([[2.0, 3.0], [4.0, 5.0]], dtype=torch.float64)
    losses = torch.tensor([[1.0, 0.5], [1.0, 0.5]], dtype=torch.float64)
    with pytest.raises(BudgetError, match="time of 5, the least is 6"):
        choose_under_budget(losses, costs, 5.0)
    assert choose_under_budget(losses, costs, 6.0).tolist() == [0, 0]
    with pytest.raises(BudgetError, match=r"loss of 0\.9, the least is 1"):
        choose_under_loss(losses, costs, 0.9)


def test_every_registered_pattern_and_the_papers_search_space_are_offered():
    offered = default_candidates()
    assert {candidate.name for candidate in offered} == set(registered_patterns())
    paper = [mpass.AShape(1024, 4096), mpass.BlockSparse(100)]
    paper += [mpass.VerticalSlash(*s) for s in ((30, 2048), (100, 1800), (500, 1500), (3000, 200))]
    assert set(paper) <= set(offered)
    assert len(set(offered)) == len(offered)


def test_long_prompts_weigh_more_and_retrieval_by_its_weight():
    text, short = inputs(1, 600)
    long = Sample(torch.zeros(1, 1200, dtype=torch.int64), ("x",), ((1196, 1200),), 1196)
    items = [as_input(value) for value in (text, short, long)]
    assert input_weights(items, Settings(retrieval_weight=0.4)) == pytest.approx([1.0, 0.1, 0.3])
