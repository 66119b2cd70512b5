"""Offline search: which pattern each head should use, under a budget for the whole model.

1. Dense runs measure, for every layer, head and candidate, the squared error of the head's output
   (and the recall of exact attention mass), the work, and the time that finding the keys takes.
2. Runs with one layer sparse measure what that layer's error does to the model's predictions: the
   divergence per unit of squared error, for texts and for retrieval prompts.
3. The two make a predicted divergence per head and candidate; the kernels' fitted run time makes a
   cost; a knapsack over all heads takes the least divergence within the budget.
4. Held-out inputs, and longer ones, check the choice beside the best uniform pattern.

Recall alone does not do: it treats every head's mass alike, and picks worse than one fixed pattern.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpass.calibration.candidates import default_candidates
from mpass.calibration.check import check_inputs
from mpass.calibration.kernel_cost import KernelCost
from mpass.calibration.knapsack import choose_under_budget, choose_under_loss
from mpass.calibration.measure import LayerMeasures, measure_inputs
from mpass.calibration.outcome import Calibration, make_config
from mpass.calibration.predict import head_costs, least_costs, predicted_losses, weigh
from mpass.calibration.probe import Probe, as_input
from mpass.calibration.provenance import describe, fingerprint
from mpass.calibration.sensitivity import measure_slopes
from mpass.calibration.settings import OnProgress, Settings, check_settings
from mpass.calibration.state import State
from mpass.config.sparse_config import SparseConfig
from mpass.errors import BudgetError, CalibrationError
from mpass.patterns.base import Pattern
from mpass.patterns.dense import Dense

__all__ = ["Calibration", "Settings", "calibrate", "run_calibration"]


def calibrate(
    model: Any,
    inputs: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    candidates: Sequence[Pattern] | None = None,
    settings: Settings | None = None,
    state: str | Path | None = None,
    on_progress: OnProgress = lambda step, done, total: None,
    announce: OnProgress | None = None,
) -> SparseConfig:
    """Search a SparseConfig for a model; `run_calibration` gives all that was measured with it.

    model: any module that the backend serves, in eval mode.
    inputs: token ids [1, N], or retrieval prompts (mpass.evaluate.samples.Sample).
    held_out: inputs of the same kinds, on which the result is compared with dense attention.
    candidates: the patterns to choose from; by default those that each pattern offers.
    settings: what is searched for, and how; see mpass.calibration.Settings.
    state: a file to resume from and append to.
    on_progress: is called with a step's name, what is done of it, and how much there is.
    announce: the older name of on_progress.

    Raises CalibrationError, BudgetError and OptionValueError.
    """
    return run_calibration(
        model,
        inputs,
        held_out=held_out,
        candidates=candidates,
        settings=settings,
        state=state,
        on_progress=announce or on_progress,
    ).config


def run_calibration(
    model: Any,
    inputs: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    candidates: Sequence[Pattern] | None = None,
    settings: Settings | None = None,
    state: str | Path | None = None,
    on_progress: OnProgress = lambda step, done, total: None,
    announce: OnProgress | None = None,
) -> Calibration:
    """The same as `calibrate`, with everything that was measured."""
    settings = settings or Settings()
    on_progress = announce or on_progress
    check_settings(settings)
    items = [as_input(value) for value in inputs]
    if not any(item.kind == "text" for item in items):
        raise CalibrationError("the inputs hold no text; give token ids [1, N] of at least one")
    offered = tuple(dict.fromkeys((Dense(), *(candidates or default_candidates()))))
    probe = Probe(model)
    kept = State(
        None if state is None else Path(state), fingerprint(model, items, offered, settings)
    )
    total = number_of_layers(model)

    def refuse(measured: Mapping[int, LayerMeasures], after: int, kernel: KernelCost) -> None:
        if settings.budget is not None and len(probe.instrument.layers) == total:
            refuse_early(measured, after, kernel, settings.budget)

    measures, kernel, sizes = measure_inputs(
        probe, items, offered, settings, kept, on_progress, refuse
    )
    layers = sorted(measures[0])
    costs = head_costs(items, measures, layers, kernel)
    dense_seconds = kernel.dense_layer * len(layers)
    if settings.budget is not None:  # before the runs with one layer sparse, which take longest
        check_budget(settings.budget, float(costs.amin(2).sum()), dense_seconds)
    slopes = measure_slopes(probe, items, layers, settings, kept, on_progress)

    errors = weigh(items, [[m[n].error for n in layers] for m in measures], settings)
    recalls = weigh(items, [[m[n].recall for n in layers] for m in measures], settings)
    losses = predicted_losses(items, measures, layers, slopes, errors, recalls, settings)
    flat_losses, flat_costs = losses.flatten(0, 1), costs.flatten(0, 1)
    if settings.max_loss is not None:
        chosen = choose_under_loss(flat_losses, flat_costs, settings.max_loss)
    else:
        assert settings.budget is not None
        chosen = choose_under_budget(flat_losses, flat_costs, settings.budget * dense_seconds)
    chosen = chosen.view(losses.shape[:2])
    outcome = Calibration(
        config=make_config(chosen, layers, offered, sizes),
        candidates=offered,
        layers=layers,
        sizes=sizes,
        losses=losses,
        costs=costs,
        errors=errors,
        recalls=recalls,
        slopes=slopes,
        chosen=chosen,
        kernel=kernel,
        dense_seconds=dense_seconds,
        length=max(item.length for item in items if item.kind == "text"),
    )
    checks = check_inputs(probe, outcome, [as_input(value) for value in held_out], on_progress)
    outcome = replace(outcome, checks=checks)
    provenance = describe(model, items, settings, outcome)
    return replace(outcome, config=make_config(chosen, layers, offered, sizes, provenance))


def number_of_layers(model: Any) -> int | None:
    """How many layers a model of transformers says that it has; None of others."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    found: int | None = getattr(text, "num_hidden_layers", None)
    return found


def check_budget(budget: float, least: float, dense_seconds: float) -> None:
    """Raise BudgetError where the cheapest choice takes longer than the budget."""
    if least > budget * dense_seconds * (1 + 1e-9):
        raise BudgetError(budget * dense_seconds, least, dense=dense_seconds)


def refuse_early(
    measured: Mapping[int, LayerMeasures], after: int, kernel: KernelCost, budget: float
) -> None:
    """Raise BudgetError as soon as no choice for the layers to come can make up for the cheapest
    one of those that are measured.

    after: the most layers to come; those with a window do not count, and which have one is not
    known. What is linear in their number is too much for any of them if it is for none and for all.
    """
    least, floor = least_costs(measured, kernel)
    for more in (0, after):
        dense_seconds = kernel.dense_layer * (len(measured) + more)
        if least + floor * more <= budget * dense_seconds * (1 + 1e-9):
            return
    check_budget(budget, least + floor * after, kernel.dense_layer * (len(measured) + after))
