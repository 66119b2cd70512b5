"""Held-out inputs: dense, with the choice of a calibration, and with one pattern for all heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.calibration.instrument import Attend, AttentionOperands, attend_dense, attend_sparse
from mpass.calibration.kernel_cost import read_clock
from mpass.calibration.outcome import Calibration, make_config
from mpass.calibration.probe import Input, Probe
from mpass.calibration.settings import OnProgress
from mpass.config.sparse_config import SparseConfig
from mpass.patterns.dense import Dense


@dataclass
class Timed:
    """An attention that counts the seconds it takes, as of `read_clock`."""

    attend: Attend
    seconds: float = 0.0

    def __call__(self, operands: AttentionOperands) -> Tensor:
        start = read_clock(operands.query.device)
        out = self.attend(operands)
        self.seconds += read_clock(operands.query.device) - start
        return out


def check_inputs(
    probe: Probe, outcome: Calibration, items: Sequence[Input], on_progress: OnProgress
) -> list[dict[str, Any]]:
    """Run inputs dense, with the choice, and with the best uniform pattern of no more cost.

    Per input: kind, length, whether it is longer than all texts of the search, and the figures of
    `check_input` for each of the three.
    """
    number = outcome.uniform(outcome.chosen_seconds)
    everywhere = torch.full_like(outcome.chosen, number)
    uniform = make_config(everywhere, outcome.layers, outcome.candidates, outcome.sizes)
    configs = {"searched": outcome.config, f"uniform {outcome.candidates[number]}": uniform}
    checks = []
    for done, item in enumerate(items):
        on_progress(f"held-out input {done + 1} of {len(items)}", done, len(items))
        longer = item.length > outcome.length
        check: dict[str, Any] = {"kind": item.kind, "length": item.length, "longer": longer}
        exact, check["dense"] = check_input(probe, item, None)
        for name, config in configs.items():
            _, check[name] = check_input(probe, item, config, exact)
        checks.append(check)
    return checks


def check_input(
    probe: Probe, item: Input, config: SparseConfig | None, exact: Tensor | None = None
) -> tuple[Tensor, dict[str, float]]:
    """Run one input with a config, or dense if it is None; returns the hidden states and figures.

    Figures: the loss (nats per token), the seconds of all attention, for retrieval the share of the
    answer's tokens that were found and, given the dense run's hidden states `exact`, the divergence
    from it.
    """
    attend = Timed(attend_dense if config is None else attend_with(config))
    out = probe.run(item.tokens, attend)
    figures = {"loss": probe.loss(out, item), "seconds": attend.seconds}
    if exact is not None:
        figures["divergence"] = probe.divergence(exact, out, item)
    if item.kind == "retrieval":
        figures["found"] = probe.found(out, item)
    return out, figures


def attend_with(config: SparseConfig) -> Attend:
    """Attention as the backend would run it with a config; heads that it leaves open are dense."""

    def attend(operands: AttentionOperands) -> Tensor:
        heads = range(operands.num_heads)
        patterns = [config.pattern(operands.layer, head) or Dense() for head in heads]
        if all(isinstance(pattern, Dense) for pattern in patterns):
            return attend_dense(operands)
        return attend_sparse(operands, patterns)

    return attend
