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

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpass.calibration.candidates import default_candidates
from mpass.calibration.check import check_inputs
from mpass.calibration.knapsack import choose_under_budget, choose_under_loss
from mpass.calibration.measure import measure_inputs
from mpass.calibration.outcome import Calibration, make_config
from mpass.calibration.predict import head_costs, predicted_losses, weigh
from mpass.calibration.probe import Probe, as_input
from mpass.calibration.provenance import describe, fingerprint
from mpass.calibration.sensitivity import measure_slopes
from mpass.calibration.settings import OnProgress, Settings, check_settings
from mpass.calibration.state import State
from mpass.config.sparse_config import SparseConfig
from mpass.errors import CalibrationError
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
    measures, kernel, sizes = measure_inputs(probe, items, offered, settings, kept, on_progress)
    layers = sorted(measures[0])
    slopes = measure_slopes(probe, items, layers, settings, kept, on_progress)

    costs = head_costs(items, measures, layers, kernel)
    errors = weigh(items, [[m[n].error for n in layers] for m in measures], settings)
    recalls = weigh(items, [[m[n].recall for n in layers] for m in measures], settings)
    losses = predicted_losses(items, measures, layers, slopes, errors, recalls, settings)
    flat_losses, flat_costs = losses.flatten(0, 1), costs.flatten(0, 1)
    dense_seconds = kernel.dense_layer * len(layers)
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
