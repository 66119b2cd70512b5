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

import hashlib
import json
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpass.calibration_choose import choose_under_budget, choose_under_loss
from mpass.calibration_cost import KernelCost, fit_kernel
from mpass.calibration_graph import Operands, attend_dense, attend_sparse
from mpass.calibration_measure import LayerMeasures, measure_layer
from mpass.calibration_probe import Input, Probe, as_input, shorten
from mpass.calibration_state import State
from mpass.config import SparseConfig
from mpass.errors import CalibrationError, OptionValueError
from mpass.lowering.index import BLOCK
from mpass.patterns.a_shape import AShape
from mpass.patterns.base import Pattern, registered_patterns
from mpass.patterns.block_sparse import BlockSparse
from mpass.patterns.dense import Dense
from mpass.patterns.union import Union
from mpass.patterns.vertical_slash import VerticalSlash

DISTURBANCE = AShape(16, BLOCK)
"""What a layer is made sparse with to see how much it matters. It must lose something in every head
at any length: a pattern that adapts may keep everything of a short text, and the quotient of
divergence and error would be one of rounding errors."""

Announce = Callable[[str, int, int], None]
"""Told (what is being done, steps done, steps in all)."""


@dataclass(frozen=True)
class Settings:
    """How to search.

    budget: attention time of the whole model, as a share of that of dense attention; or max_loss:
    the most predicted divergence, in nats per token, for which the cheapest choice is taken.
    retrieval_weight: what the divergence at a retrieval answer counts beside that of a text.
    query_blocks: blocks of 64 queries per prompt on which outputs are compared.
    sensitivity_length: texts are cut to this for the runs with one layer sparse, tokens.
    objective: "divergence" (of step 3), "error" (of outputs) or "recall" (of mass); the latter two
    are there to be compared with.
    """

    budget: float | None = 0.25
    max_loss: float | None = None
    retrieval_weight: float = 0.1
    query_blocks: int = 12
    sensitivity_length: int = 1024
    objective: str = "divergence"


@dataclass(frozen=True, eq=False)
class Calibration:
    """The outcome. Letters: L layers searched, H heads, C candidates.

    layers: their numbers [L]; losses, costs, errors, recalls: fp64 [L, H, C]; chosen: int64 [L, H];
    dense_seconds: attention time of the dense model; checks: of held-out inputs, see check_inputs.
    """

    config: SparseConfig
    candidates: tuple[Pattern, ...]
    layers: list[int]
    losses: Tensor
    costs: Tensor
    errors: Tensor
    recalls: Tensor
    chosen: Tensor
    kernel: KernelCost
    dense_seconds: float
    checks: list[dict[str, Any]] = field(default_factory=list)

    def uniform(self, budget: float) -> int:
        """The candidate that, used by every head, loses least within `budget` seconds."""
        cost, loss = self.costs.sum((0, 1)), self.losses.sum((0, 1))
        fits = torch.where(cost <= budget, loss, torch.inf)
        return int(fits.argmin() if bool(torch.isfinite(fits).any()) else cost.argmin())

    @property
    def chosen_seconds(self) -> float:
        return float(self.costs.gather(2, self.chosen[..., None]).sum())


def default_candidates() -> tuple[Pattern, ...]:
    """MInference's sizes (its paper's Table 7 and its released search), and every other pattern."""
    table = [(30, 2048), (100, 1800), (500, 1500), (3000, 200)]
    released = [(30, 800), (100, 800), (500, 700), (1000, 1024), (3500, 100), (1000, 6096)]
    listed: list[Pattern] = [Dense(), AShape(64, 256), AShape(128, 1024), AShape(1024, 4096)]
    listed += [VerticalSlash(*sizes) for sizes in (*table, *released)]
    listed += [BlockSparse(count) for count in (8, 16, 32)]
    listed += [
        Union(row_share=share, columns=columns)
        for share in (0.02, 0.05, 0.1, 0.25)
        for columns in (64, 512)
    ]
    known = {type(pattern) for pattern in listed}
    others = [cls() for cls in registered_patterns().values() if cls not in known]
    return tuple(listed + others)


def calibrate(
    model: Any,
    inputs: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    candidates: Sequence[Pattern] | None = None,
    settings: Settings | None = None,
    state: str | Path | None = None,
    announce: Announce = lambda step, done, total: None,
) -> SparseConfig:
    """Search a SparseConfig for a model; `run_calibration` gives all that was measured with it.

    model: any module that the backend serves, in eval mode. inputs: token ids [1, N], or retrieval
    prompts (mpass.evaluate.samples.Sample). state: file to resume from and append to. Raises
    CalibrationError, BudgetError, OptionValueError.
    """
    return run_calibration(
        model,
        inputs,
        held_out=held_out,
        candidates=candidates,
        settings=settings,
        state=state,
        announce=announce,
    ).config


def run_calibration(
    model: Any,
    inputs: Sequence[Any],
    *,
    held_out: Sequence[Any] = (),
    candidates: Sequence[Pattern] | None = None,
    settings: Settings | None = None,
    state: str | Path | None = None,
    announce: Announce = lambda step, done, total: None,
) -> Calibration:
    """As `calibrate`, with everything that was measured."""
    settings = settings or Settings()
    check_settings(settings)
    items = [as_input(value) for value in inputs]
    if not any(item.kind == "text" for item in items):
        raise CalibrationError("the inputs hold no text; give token ids [1, N] of at least one")
    offered = tuple(dict.fromkeys((Dense(), *(candidates or default_candidates()))))
    probe = Probe(model)
    kept = State(
        None if state is None else Path(state), fingerprint(model, items, offered, settings)
    )
    measures, kernel, sizes = measure_inputs(probe, items, offered, settings, kept, announce)
    layers = sorted(measures[0])
    slopes = measure_slopes(probe, items, layers, offered, settings, kept, announce)

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
    config = make_config(chosen, layers, offered, sizes)
    outcome = Calibration(
        config, offered, layers, losses, costs, errors, recalls, chosen, kernel, dense_seconds
    )
    outcome.checks.extend(check_inputs(probe, outcome, [as_input(v) for v in held_out], announce))
    provenance = describe(model, items, settings, outcome)
    object.__setattr__(config, "provenance", tuple(provenance.items()))
    return outcome


def check_settings(settings: Settings) -> None:
    """Raise OptionValueError for numbers that make no search."""
    if (settings.budget is None) == (settings.max_loss is None):
        raise OptionValueError("budget", settings.budget, "given, or max_loss instead of it")
    for name in ("budget", "max_loss"):
        value = getattr(settings, name)
        if value is not None and not value > 0:
            raise OptionValueError(name, value, "a number above 0")
    if settings.objective not in ("divergence", "error", "recall"):
        raise OptionValueError("objective", settings.objective, "divergence, error, recall")
    if settings.query_blocks < 1 or settings.retrieval_weight < 0:
        raise OptionValueError("query_blocks", settings.query_blocks, "1 or more")


def measure_inputs(
    probe: Probe,
    items: Sequence[Input],
    candidates: Sequence[Pattern],
    settings: Settings,
    kept: State,
    announce: Announce,
) -> tuple[list[dict[int, LayerMeasures]], KernelCost, tuple[int, int]]:
    """Dense runs over all inputs; per input the measures of each layer.

    Also the kernels' cost at the longest text, and the numbers of query and kv heads.
    """
    longest = max((i for i in items if i.kind == "text"), key=lambda item: item.length)
    for number, item in enumerate(items):
        if f"input {number}" in kept:
            continue
        done = 0

        def attend(operands: Operands, number: int = number, item: Input = item) -> Tensor:
            nonlocal done
            key = f"measures {number} {operands.layer}"
            out = attend_dense(operands)
            if operands.mask.window > 0:  # cheap already, and its far keys are never seen
                return out
            if item is longest and "kernel" not in kept:
                kept["kernel"] = fit_kernel(operands).as_dict()
                kept["heads"] = [operands.num_heads, operands.key.shape[1]]
            if key not in kept:
                kept[key] = measure_layer(
                    operands,
                    candidates,
                    max_query_blocks=settings.query_blocks,
                    rows=None if item.kind == "text" else item.rows.tolist(),
                ).as_lists()
            done += 1
            total = len(probe.instrument.layers)
            announce(f"input {number + 1} of {len(items)}: layer {operands.layer}", done, total)
            return out

        probe.run(item.tokens, attend)
        kept[f"input {number}"] = probe.instrument.layers
    found: list[dict[int, LayerMeasures]] = []
    for number in range(len(items)):
        layers = kept[f"input {number}"]
        keys = {layer: f"measures {number} {layer}" for layer in layers}
        found.append(
            {
                layer: LayerMeasures.from_lists(kept[key])
                for layer, key in keys.items()
                if key in kept
            }
        )
    if not found[0]:
        reasons = "; ".join(sorted(set(probe.instrument.skipped))[:3]) or "no attention was found"
        raise CalibrationError(f"no layer can be made sparse: {reasons}")
    return found, KernelCost(**kept["kernel"]), tuple(kept["heads"])


def measure_slopes(
    probe: Probe,
    items: Sequence[Input],
    layers: Sequence[int],
    candidates: Sequence[Pattern],
    settings: Settings,
    kept: State,
    announce: Announce,
) -> dict[str, Tensor]:
    """Divergence per unit of squared output error of each layer: fp64 [L] per kind of input.

    One text and one retrieval prompt are run once per layer, that layer alone made sparse.
    """
    if settings.objective != "divergence":
        return {}
    slopes = {}
    for kind in dict.fromkeys(item.kind for item in items):
        item = shorten(next(i for i in items if i.kind == kind), settings.sensitivity_length)
        missing = [layer for layer in layers if f"slope {kind} {layer}" not in kept]
        exact = probe.run(item.tokens, attend_dense) if missing else None
        for done, layer in enumerate(missing):
            announce(f"sensitivity to {kind}: layer {layer}", done, len(missing))
            error = 0.0

            def attend(operands: Operands, layer: int = layer, item: Input = item) -> Tensor:
                nonlocal error
                out = attend_dense(operands)
                if operands.layer != layer:
                    return out
                sparse = attend_sparse(operands, [DISTURBANCE] * operands.num_heads)
                rows = item.rows.to(out.device)
                gap = (sparse - out)[:, :, rows].double()
                error = float(gap.square().sum((1, 3)).mean())
                return sparse

            sparse = probe.run(item.tokens, attend)
            assert exact is not None
            divergence = max(0.0, probe.divergence(exact, sparse, item))
            kept[f"slope {kind} {layer}"] = divergence / error if error > 0 else 0.0
        slopes[kind] = torch.tensor(
            [kept[f"slope {kind} {layer}"] for layer in layers], dtype=torch.float64
        )
    return slopes


def head_costs(
    items: Sequence[Input],
    measures: Sequence[dict[int, LayerMeasures]],
    layers: Sequence[int],
    kernel: KernelCost,
) -> Tensor:
    """Seconds of each head with each candidate on the longest texts: fp64 [L, H, C]."""
    longest = max(item.length for item in items if item.kind == "text")
    texts = [
        m for i, m in zip(items, measures, strict=True) if i.kind == "text" and i.length == longest
    ]
    rows = []
    # Finding keys takes as long in every layer; the median is not moved by a busy machine.
    estimation = torch.stack([m[n].estimation for m in texts for n in layers]).median(0).values
    for layer in layers:
        work = torch.stack([kernel.seconds(m[layer].tiles, m[layer].columns) for m in texts])
        heads = work.shape[-1]
        cost = work.mean(0) + estimation[:, None] / heads
        cost[0] = kernel.dense_layer / heads
        rows.append(cost.T)
    return torch.stack(rows)


def weigh(items: Sequence[Input], values: Sequence[Sequence[Tensor]], settings: Settings) -> Tensor:
    """Mean over inputs of per-layer [C, H] values, retrieval weighted: fp64 [L, H, C]."""
    weights = input_weights(items, settings)
    per_input = [torch.stack([v.T for v in layers]) for layers in values]
    total = sum(w * v for w, v in zip(weights, per_input, strict=True))
    return torch.as_tensor(total) / sum(weights)


def input_weights(items: Sequence[Input], settings: Settings) -> list[float]:
    """1 shared by the texts, retrieval_weight shared by the retrieval prompts."""
    count = {kind: sum(item.kind == kind for item in items) for kind in ("text", "retrieval")}
    share = {"text": 1.0, "retrieval": settings.retrieval_weight}
    return [share[item.kind] / count[item.kind] for item in items]


def predicted_losses(
    items: Sequence[Input],
    measures: Sequence[dict[int, LayerMeasures]],
    layers: Sequence[int],
    slopes: dict[str, Tensor],
    errors: Tensor,
    recalls: Tensor,
    settings: Settings,
) -> Tensor:
    """What the objective says each head loses with each candidate: fp64 [L, H, C]; dense is 0."""
    if settings.objective == "recall":
        losses = 1.0 - recalls
    elif settings.objective == "error":
        losses = errors.clone()
    else:
        losses = torch.zeros_like(errors)
        weights = input_weights(items, settings)
        for weight, item, measured in zip(weights, items, measures, strict=True):
            error = torch.stack([measured[layer].error.T for layer in layers])
            losses += weight * slopes[item.kind][:, None, None] * error
    losses[..., 0] = 0.0
    return losses


def make_config(
    chosen: Tensor, layers: Sequence[int], candidates: Sequence[Pattern], sizes: tuple[int, int]
) -> SparseConfig:
    """The SparseConfig of a choice [L, H]."""
    patterns = {
        layer: [candidates[int(c)] for c in row] for layer, row in zip(layers, chosen, strict=True)
    }
    whole = list(layers) == list(range(len(layers)))
    return SparseConfig(
        layers=patterns,
        num_layers=len(layers) if whole else None,
        num_heads=sizes[0],
        num_kv_heads=sizes[1],
    )


def check_inputs(
    probe: Probe, outcome: Calibration, items: Sequence[Input], announce: Announce
) -> list[dict[str, Any]]:
    """Run inputs dense, with the choice, and with the best uniform pattern of no more cost.

    Per input: kind, length, and for each of the three the loss, the divergence and, for retrieval,
    the share of the answer's tokens that were found.
    """
    uniform = outcome.candidates[outcome.uniform(outcome.chosen_seconds)]
    by_layer = dict(zip(outcome.layers, outcome.chosen.tolist(), strict=True))

    def attend(operands: Operands) -> Tensor:
        row = by_layer.get(operands.layer)
        if row is None:
            return attend_dense(operands)
        return attend_mixed(operands, [outcome.candidates[c] for c in row])

    def attend_uniform(operands: Operands) -> Tensor:
        if operands.layer not in by_layer:
            return attend_dense(operands)
        return attend_mixed(operands, [uniform] * operands.num_heads)

    checks = []
    for number, item in enumerate(items):
        announce(f"held-out input {number + 1} of {len(items)}", number, len(items))
        exact = probe.run(item.tokens, attend_dense)
        check: dict[str, Any] = {"kind": item.kind, "length": item.length}
        runs = {"dense": None, "searched": attend, f"uniform {uniform}": attend_uniform}
        for name, how in runs.items():
            out = exact if how is None else probe.run(item.tokens, how)
            check[name] = {"loss": probe.loss(out, item)}
            if how is not None:
                check[name]["divergence"] = probe.divergence(exact, out, item)
            if item.kind == "retrieval":
                check[name]["found"] = probe.found(out, item)
        checks.append(check)
    return checks


def attend_mixed(operands: Operands, patterns: Sequence[Pattern]) -> Tensor:
    """Sparse, unless every head is dense: then what the backend would leave alone."""
    if all(isinstance(pattern, Dense) for pattern in patterns):
        return attend_dense(operands)
    return attend_sparse(operands, patterns)


def fingerprint(
    model: Any, items: Sequence[Input], candidates: Sequence[Pattern], settings: Settings
) -> str:
    """A hash of all that measurements depend on; budget and weights only matter later."""
    parts = [
        identify(model),
        [hash_tokens(item) for item in items],
        [str(candidate) for candidate in candidates],
        [settings.query_blocks, settings.sensitivity_length],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def identify(model: Any) -> str:
    """Class, sizes and weights of a model, in short: the weights by a sample of each tensor."""
    digest = hashlib.sha256(type(model).__qualname__.encode())
    for name, tensor in model.state_dict().items():
        sample = tensor.detach().flatten()[:: max(1, tensor.numel() // 16)].float().cpu()
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(sample.numpy().tobytes())
    return f"{type(model).__qualname__} {digest.hexdigest()[:16]}"


def hash_tokens(item: Input) -> str:
    """Kind, length and content of an input, in short."""
    content = ",".join(map(str, item.tokens[0].tolist())).encode()
    return f"{item.kind} {item.length} {hashlib.sha256(content).hexdigest()[:16]}"


def describe(
    model: Any, items: Sequence[Input], settings: Settings, outcome: Calibration
) -> dict[str, Any]:
    """Provenance: what was searched on what, by which versions, and what came out."""
    import datetime

    from mpass import __version__

    at = float(outcome.losses.gather(2, outcome.chosen[..., None]).sum())
    return {
        "made_by": f"mpass {__version__} calibrate, torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": identify(model),
        "inputs": [hash_tokens(item) for item in items],
        "budget": settings.budget,
        "max_loss": settings.max_loss,
        "objective": settings.objective,
        "predicted_loss": at,
        "attention_seconds": {
            "dense": outcome.dense_seconds,
            "searched": outcome.chosen_seconds,
        },
        "kernel_cost": outcome.kernel.as_dict(),
        "held_out": outcome.checks,
        "median_recall": statistics.median(
            outcome.recalls.gather(2, outcome.chosen[..., None]).flatten().tolist()
        ),
    }
