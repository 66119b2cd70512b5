"""Which attention may leave something out at which steps of a sampler: `mpass.search_denoising`.

One sampling with dense attention tells, per attention and step, what older steps would have given
instead (lowering/denoising_probe.py). In each range of steps an attention gets a distance of whole
steps and what is kept between them, so that all errors together are least under a budget of cells:
a knapsack. DiTFastAttn (arXiv 2406.08552) chooses by a threshold per step instead.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from mpass.calibration.knapsack import choose_under_budget
from mpass.errors import ArgumentError, CalibrationError
from mpass.lowering.denoising import MEMORY, DenoisingRun, running
from mpass.lowering.denoising_plan import DenoisingPlan, Keep, Schedule, Span
from mpass.lowering.denoising_probe import Probe


@dataclass(frozen=True, slots=True)
class Choice:
    """A way through one range of steps: its span, its errors summed over steps, its cells in steps
    of dense attention.
    """

    span: Span
    error: float
    cells: float


def search_denoising(
    sample: Callable[[DenoisingRun], object],
    steps: int,
    *,
    cells: float = 0.4,
    full: int | None = None,
    ranges: int = 5,
    every: Sequence[int] = (2, 3, 4, 6, 8),
    scheduler: Any = None,
) -> DenoisingPlan:
    """Search a plan for `mpass.denoising(steps, plan=...)`, for each attention and range of steps.

    sample: runs one sampling of a model that is compiled with `options={"denoising": True,
        "pattern": ...}`, and is given the run, whose `over` tells the steps; where `scheduler` is
        given it need not use it. Attention is dense in it.
    steps: of the sampler. cells: share of the cells of dense attention that all attentions may
        compute over all steps. full: so many steps at the start are whole, a twentieth and at least
        one by default: from noise everything changes, and all that follows hangs on it. ranges: so
        many ranges of the other steps are decided apart.
    every: distances of whole steps that are tried, beside whole steps only.
    scheduler: as of `mpass.denoising`.

    Errors are squared relative differences of one attention's output, at the inputs of dense
    sampling: what is left out earlier does not count in them. The same sampling gives the same
    plan. Memory and time: per distance one residual and one output of every attention, and one
    sparse attention more per step.

    Raises ArgumentError for a number that cannot be, `cells` that no plan keeps among them, and
    CalibrationError where no attention asked.
    """
    first = max(1, steps // 20) if full is None and isinstance(steps, int) else full
    first = check_numbers(steps, first, ranges, cells, every)
    ends = [first + (steps - first) * number // ranges for number in range(ranges + 1)]
    spans = tuple(itertools.pairwise(ends))
    probe = Probe(spans, tuple(dict.fromkeys(every)))
    run = DenoisingRun(Schedule(steps, steps, 1), MEMORY, probe=probe)
    with running(run, scheduler):
        sample(run)
    if not probe.cells:
        raise CalibrationError(
            "no attention was seen at any step: compile the model with options={'denoising': True, "
            "'pattern': ...}, and let run.over(timesteps) or a scheduler tell the steps"
        )
    places = sorted(probe.cells)
    groups = [choices_of(probe, place, span) for place in places for span in spans]
    budget = (cells * steps - first) * len(places)
    least = sum(min(choice.cells for choice in group) for group in groups)
    if least > budget:
        share = math.ceil(100 * (least / len(places) + first) / steps) / 100
        raise ArgumentError("cells", cells, f"{share} or more, what the sparsest plan computes")
    chosen = least_errors(groups, budget)
    start = Span(0, first, 1)
    spans_of = [(start, *chosen[i : i + ranges]) for i in range(0, len(chosen), ranges)]
    return DenoisingPlan(steps, tuple(spans_of))


def check_numbers(
    steps: int, full: int | None, ranges: int, cells: float, every: Sequence[int]
) -> int:
    """The whole steps at the start. Raises ArgumentError for a number that cannot be."""
    for name, value, least in (("steps", steps, 2), ("full", full, 1), ("ranges", ranges, 1)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ArgumentError(name, value, f"an int >= {least}")
    assert full is not None, "it is an int"
    if full >= steps:
        raise ArgumentError("full", full, f"an int < steps, {steps}")
    if ranges > steps - full:
        raise ArgumentError("ranges", ranges, f"an int <= the other steps, {steps - full}")
    if isinstance(cells, bool) or not isinstance(cells, int | float) or not 0 < cells <= 1:
        raise ArgumentError("cells", cells, "a share, 0 < cells <= 1")
    if not every or any(isinstance(n, bool) or not isinstance(n, int) or n < 2 for n in every):
        raise ArgumentError("every", tuple(every), "ints >= 2")
    return full


def choices_of(probe: Probe, place: int, span: tuple[int, int]) -> list[Choice]:
    """What an attention may do in a range of steps: all of it whole, and less."""
    start, stop = span
    found = [Choice(Span(start, stop, 1), 0.0, float(stop - start))]
    share = statistics.fmean(probe.cells[place])
    for every in probe.every:
        between = [step for step in range(start, stop) if (step - start) % every]
        whole = stop - start - len(between)
        measured: tuple[tuple[Keep, dict[tuple[int, int, int], float], float], ...] = (
            ("residual", probe.residual, share),
            ("output", probe.output, 0.0),
        )
        for keep, errors, cost in measured:
            past = [(place, step, step - (step - start) % every) for step in between]
            if not between or any(key not in errors for key in past):
                continue  # a sampler that stopped early
            error = sum(errors[key] for key in past)
            found.append(Choice(Span(start, stop, every, keep), error, whole + cost * len(between)))
    return found


def least_errors(groups: Sequence[Sequence[Choice]], budget: float) -> list[Span]:
    """One choice of each group, with the least sum of errors under a budget of cells."""
    if sum(group[0].cells for group in groups) <= budget * (1 + 1e-9):
        return [group[0].span for group in groups]  # the knapsack's grid might not hold all of it
    most = max(map(len, groups))
    losses = torch.full((len(groups), most), torch.inf, dtype=torch.float64)
    costs = torch.full((len(groups), most), 2 * budget + 1.0, dtype=torch.float64)
    for row, group in enumerate(groups):
        for column, choice in enumerate(group):
            losses[row, column], costs[row, column] = choice.error, choice.cells
    picks = choose_under_budget(losses, costs, budget)
    return [group[int(pick)].span for group, pick in zip(groups, picks, strict=True)]
