"""Choosing a pattern per head under a budget for the whole model: a multiple-choice knapsack.

Solved by dynamic programming over a grid of costs. Costs are rounded up to the grid, so the budget
is never exceeded, and at most S / G of it is left unused by the rounding; on the grid the choice is
the best there is. Letters: S heads of all layers, C candidates, G steps of the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.errors import BudgetError

STEPS = 20_000
"""Steps of the cost grid."""


def choose_under_budget(losses: Tensor, costs: Tensor, budget: float) -> Tensor:
    """The candidate of each head that makes the sum of losses least: int64 [S].

    losses, costs: fp64 [S, C]; budget: at least the sum of the cheapest costs, else BudgetError.
    """
    cheapest = float(costs.amin(1).sum())
    if cheapest > budget * (1 + 1e-9):
        raise BudgetError(budget, cheapest)
    table, picks, step = solve(losses, costs, budget)
    if not bool(torch.isfinite(table[-1])):  # only the rounding up made it too expensive
        return costs.argmin(1)
    return trace_back(picks, step, len(table) - 1)


def choose_under_loss(losses: Tensor, costs: Tensor, most: float) -> Tensor:
    """The cheapest candidates whose losses sum to at most `most`: int64 [S].

    Raises BudgetError if even the best candidates lose more.
    """
    least = float(losses.amin(1).sum())
    if least > most:
        raise BudgetError(most, least, what="loss")
    best = losses.argmin(1)
    budget = float(costs.gather(1, best[:, None]).sum()) * (1 + len(costs) / STEPS)
    table, picks, step = solve(losses, costs, budget)
    fits = (table <= most).nonzero()
    if len(fits) == 0:
        return best
    return trace_back(picks, step, int(fits[0]))


def solve(losses: Tensor, costs: Tensor, budget: float) -> tuple[Tensor, Tensor, Tensor]:
    """The least loss for every budget up to the given one, fp64 [G + 1], and how it is reached.

    Returns also the picks int16 [S, G + 1] and the costs in steps, int64 [S, C].
    """
    heads, candidates = losses.shape
    unit = max(budget, 1e-300) / STEPS
    steps = (costs / unit - 1e-6).ceil().clamp(0, STEPS + 1).long()
    table = torch.zeros(STEPS + 1, dtype=torch.float64)
    picks = torch.zeros(heads, STEPS + 1, dtype=torch.int16)
    for head in range(heads):
        best = torch.full_like(table, torch.inf)
        for candidate in range(candidates):
            step = int(steps[head, candidate])
            if step > STEPS:
                continue
            value = table[: STEPS + 1 - step] + losses[head, candidate]
            better = value < best[step:]
            best[step:] = torch.where(better, value, best[step:])
            picks[head, step:][better] = candidate
        table = best
    return table, picks, steps


def trace_back(picks: Tensor, steps: Tensor, at: int) -> Tensor:
    """The candidates that lead to one entry of the table."""
    chosen = torch.zeros(len(picks), dtype=torch.int64)
    for head in reversed(range(len(picks))):
        chosen[head] = int(picks[head, at])
        at -= int(steps[head, chosen[head]])
    return chosen
