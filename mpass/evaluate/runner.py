"""A model's body compiled once per pattern, and what it gives on an input."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from mpass.config.pattern_text import parse_pattern
from mpass.config.sparse_config import SparseConfig
from mpass.evaluate.plan import AUTO, DENSE, Plan
from mpass.evaluate.samples import Sample
from mpass.evaluate.score import compare_losses, loose_score, strict_score
from mpass.lowering.recorder import Call, record
from mpass.models.prefill import compile_body, continue_text, prefill

SPARE_TOKENS = 16
"""Generated beyond the answers' own length, for words around them."""


class Runner:
    """Measures inputs, dense and with each pattern of a plan, through the public backend."""

    def __init__(self, model: Any, tokenizer: Any, plan: Plan) -> None:
        torch._dynamo.reset()
        self.model, self.tokenizer, self.plan = model, tokenizer, plan
        self.forwards = {DENSE: compile_dense(model, plan.inner_backend)}
        for pattern in plan.patterns:
            options = sparse_options(model, pattern) | {
                "min_seq_len": plan.min_seq_len,
                "inner_backend": plan.inner_backend,
            }
            self.forwards[pattern] = compile_body(model, "minference", options)

    def measure(self, sample: Sample, names: Iterable[str]) -> Iterator[tuple[str, dict[str, Any]]]:
        """(pattern, its figures) for each of `names`; perplexity also compares with dense."""
        tokens = sample.tokens.to(self.plan.device)
        dense = None if sample.spans else self.prefill(DENSE, tokens)[0].last_hidden_state
        for name in names:
            if name == DENSE and dense is not None:
                hidden, density = dense, 1.0
            else:
                output, density = self.prefill(name, tokens)
                hidden = output.last_hidden_state
            figures: dict[str, Any] = {"density": density}
            if dense is not None:
                figures |= dataclasses.asdict(compare_losses(self.model, dense, hidden, tokens))
            else:
                figures["score"] = strict_score(self.model, hidden, sample)
                if self.plan.generate:
                    generated = self.generate(name, sample)
                    figures["loose"] = loose_score(generated, sample.answers)
                    figures["generated"] = generated
            yield name, figures

    def prefill(self, name: str, tokens: Tensor) -> tuple[Any, float]:
        """The body's output for [1, N], and the mean density of its full-attention layers."""
        tokens = tokens.clone()
        torch._dynamo.maybe_mark_dynamic(tokens, 1)  # one graph for all lengths
        # Beyond its limit Dynamo would run the rest uncompiled, which is dense, and say nothing.
        limits = torch._dynamo.config.patch(
            recompile_limit=1 << 16,
            accumulated_recompile_limit=1 << 16,
            fail_on_recompile_limit_hit=True,
        )
        with limits, record() as log:
            output = prefill(self.forwards[name], tokens)
        return output, mean_density(self.model, log.calls)

    def generate(self, name: str, sample: Sample) -> str:
        """What dense decoding makes of the pattern's prefill of the prompt, without the answer."""
        prompt = sample.tokens[:, : sample.prompt].to(self.plan.device)
        output, _ = self.prefill(name, prompt)
        count = sample.tokens.shape[1] - sample.prompt + SPARE_TOKENS
        dense = self.model.get_decoder().forward
        tokens = continue_text(self.model, dense, output, prompt, count)
        text: str = self.tokenizer.decode(tokens)
        return text


def compile_dense(model: Any, inner_backend: str) -> Any:
    """The body with dense attention, by `inner_backend` alone if it has no sliding windows.

    One with windows is compiled by the backend, which computes a window's cells and no others: as a
    mask of [N, N] they would take many times the work of all the rest.
    """
    if not window_layers(model):
        return compile_body(model, inner_backend)
    options = {"min_seq_len": 0, "dense_above": 1.0, "inner_backend": inner_backend}
    return compile_body(model, "minference", sparse_options(model, DENSE) | options)


def window_layers(model: Any) -> tuple[int, ...]:
    """Layers with a sliding window, as the model's configuration names them."""
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    return tuple(layer for layer, kind in enumerate(kinds) if kind == "sliding_attention")


def sparse_options(model: Any, pattern: str) -> dict[str, Any]:
    """Options of a compile: `pattern` in every full-attention layer, windows as they are."""
    if pattern == AUTO:
        return {"pattern": AUTO}
    layers = {layer: "dense" for layer in window_layers(model)}
    return {"config": SparseConfig(parse_pattern(pattern), layers=layers)}


def mean_density(model: Any, calls: Sequence[Call]) -> float:
    """Mean over the full-attention layers; those that made no call ran dense and count 1."""
    windows = window_layers(model)
    layers = model.config.get_text_config().num_hidden_layers - len(windows)
    measured = [float(call.density.mean()) for call in calls if call.layer not in windows]
    return (sum(measured) + layers - len(measured)) / layers
