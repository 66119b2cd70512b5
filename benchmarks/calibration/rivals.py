"""The rivals: every registered pattern in all heads, its knob turned to a cost."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from benchmarks.calibration.work import Plan, Work, append, load_window, model_and_tokenizer
from mpass.calibration.instrument import AttentionOperands, attend_dense, estimate_heads
from mpass.calibration.kernel_cost import KernelCost, count_work, fit_kernel, read_clock
from mpass.calibration.probe import Probe
from mpass.config.pattern_text import parse_pattern
from mpass.evaluate.plan import read_lines
from mpass.patterns.base import Pattern, registered_patterns

LAYERS = 6
"""Layers on which a rival's cost is looked up, evenly spread."""

STEPS = 12
"""Most halvings of a knob's range."""

CLOSE = 0.99
"""A rival is done when it costs this share of the budget or more, and no more than the budget."""


def knobs(length: int) -> dict[str, Callable[[float], Pattern]]:
    """Per rival the pattern for a knob from 0 (cheapest) to 1 (nearly everything)."""
    patterns = [cls for _, cls in sorted(registered_patterns().items())]
    return {name: make for cls in patterns for name, make in cls.knobs(length).items()}


def tune_rivals(work: Work, plan: Plan) -> None:
    """For each budget the dearest size of each rival within it, one line each.

    The cost is that of the kernels' cost model on the first text of the search, finding the keys
    included. A rival of which no size is cheap enough has the pattern null.
    """
    done = {(line["name"], line["budget"]) for line in read_lines(work.rivals) if "name" in line}
    makers = knobs(plan.length)
    missing = [(n, b) for b in plan.budgets for n in makers if (n, b) not in done]
    if not missing:
        return
    model, tokenizer = model_and_tokenizer(plan.model, plan.search_dtype)
    tokens = load_window(plan.search_texts[0], tokenizer, plan.length)
    picked = some_layers(Probe(model), tokens)
    fitted = next((line["kernel"] for line in read_lines(work.rivals) if "kernel" in line), None)
    if fitted is None:
        fitted = fit_kernel(picked[len(picked) // 2]).as_dict()
        append(work.rivals, {"kernel": fitted})
    kernel = KernelCost(**fitted)
    for name, budget in missing:
        pattern, share = tune(makers[name], budget, picked, kernel)
        text = None if pattern is None else str(pattern)
        append(work.rivals, {"name": name, "budget": budget, "pattern": text, "share": share})


def some_layers(probe: Probe, tokens: torch.Tensor) -> list[AttentionOperands]:
    """What `LAYERS` evenly spread layers read in a dense run."""
    probe.run(tokens[:, :64], attend_dense)
    layers = probe.instrument.layers
    step = max(1, len(layers) // LAYERS)
    wanted = set(layers[step // 2 :: step])
    kept = []

    def attend(operands: AttentionOperands) -> torch.Tensor:
        if operands.layer in wanted:
            kept.append(operands)
        return attend_dense(operands)

    probe.run(tokens, attend)
    return kept


def tune(
    make: Callable[[float], Pattern],
    budget: float,
    layers: Sequence[AttentionOperands],
    kernel: KernelCost,
) -> tuple[Pattern | None, float]:
    """The pattern whose cost comes closest to the budget from below, and its share of dense."""
    found, share = make(0.0), share_of(make(0.0), layers, kernel)
    if share > budget:
        return None, share
    low, high = 0.0, 1.0
    for _ in range(STEPS):
        middle = (low + high) / 2
        cost = share_of(make(middle), layers, kernel)
        if cost > budget:
            high = middle
            continue
        low, found, share = middle, make(middle), cost
        if share >= CLOSE * budget:
            break
    return found, share


def share_of(pattern: Pattern, layers: Sequence[AttentionOperands], kernel: KernelCost) -> float:
    """Attention time with a pattern in all heads, as a share of dense attention's."""
    spent = 0.0
    for operands in layers:
        device = operands.query.device
        start = read_clock(device)
        index = estimate_heads(operands, [pattern] * operands.num_heads)
        spent += read_clock(device) - start
        spent += float(kernel.seconds(*count_work(index, operands)).sum())
    return spent / len(layers) / kernel.dense_layer


def tuned_patterns(work: Work) -> dict[str, Pattern]:
    """Every rival that fits into a budget, by `name @ budget`."""
    return {
        f"{line['name']} @ {line['budget']:g}": parse_pattern(line["pattern"])
        for line in read_lines(work.rivals)
        if line.get("pattern")
    }
