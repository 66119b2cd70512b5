"""What attention is predicted to cost on a GPU that is not here: `mpass explain --device h100`.

Nothing runs: layers are read from the model's configuration, densities are those that prompts of a
length usually have, and times come from the cost model of mpass.lowering.triton.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from mpass.config.sparse_config import SparseConfig, builtin_default
from mpass.errors import ModelNotFoundError
from mpass.files import write_whole
from mpass.inspection.tables import span
from mpass.inspection.text_table import patterns_of_heads, render
from mpass.lowering.crossover import LayerWork, LeastLengths
from mpass.lowering.triton.chips import Chip
from mpass.lowering.triton.cost_model import Prediction, predict
from mpass.lowering.triton.decisions import known, least_lengths
from mpass.models.load import load_config
from mpass.options import Options
from mpass.patterns.base import Pattern
from mpass.patterns.base.work import layer_work

LENGTHS = (8192, 32768, 131072)
"""Tokens that are predicted for where nothing is asked."""

DEVICE_TYPE = "cuda"
"""Whose built-in default is meant; AMD's GPUs have that name in torch, too."""


@dataclass(frozen=True)
class LayerPrediction:
    """Some layers of a model that cost the same, on prompts of one length.

    layers: how many; numbers: which; patterns: of their heads, in words; length: tokens.
    runs: "sparse" or "dense", and why if that is dense; density: share of the dense work that is
    computed. The times are milliseconds of one layer: of dense attention, and of the sparse op as
    estimation, plan (with gathered columns), attention and what the host takes to launch it.
    """

    layers: int
    numbers: tuple[int, ...]
    patterns: str
    length: int
    runs: str
    reason: str
    density: float
    dense_ms: float
    sparse_ms: float
    estimate_ms: float
    plan_ms: float
    attention_ms: float
    host_ms: float

    @property
    def chosen_ms(self) -> float:
        """Of what runs."""
        return self.sparse_ms if self.runs == "sparse" else self.dense_ms


@dataclass(frozen=True)
class ModelPrediction:
    """A model on a chip: `print` it, read its fields, or `save` it as JSON."""

    model: str
    chip: Chip
    dtype: str
    layers: tuple[LayerPrediction, ...]

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens that were asked for."""
        return tuple(dict.fromkeys(layer.length for layer in self.layers))

    def totals(self, length: int) -> tuple[float, float]:
        """Milliseconds of all attention of a prefill: dense, and as it is chosen."""
        own = [layer for layer in self.layers if layer.length == length]
        dense = sum(layer.layers * layer.dense_ms for layer in own)
        return dense, sum(layer.layers * layer.chosen_ms for layer in own)

    def as_dict(self) -> dict[str, Any]:
        """Everything, fit for JSON."""
        return {
            "predicted": True,
            "model": self.model,
            "dtype": self.dtype,
            "chip": dataclasses.asdict(self.chip),
            "rates": rates_in_words(self.chip),
            "layers": [
                dataclasses.asdict(layer) | {"chosen_ms": layer.chosen_ms} for layer in self.layers
            ],
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON."""
        write_whole(Path(path), json.dumps(self.as_dict(), indent=1) + "\n")

    def __str__(self) -> str:
        return render_prediction(self)


def predict_model(
    model: str | Path, chip: Chip, options: Options, *, lengths: Sequence[int], dtype: torch.dtype
) -> ModelPrediction:
    """The attention of a model's prefill on a chip, layer by layer.

    model: as of mpass.models.load. Raises ModelNotFoundError for a configuration that does not say
    how many heads and layers there are, and what configs raise that are for another model.
    """
    config = load_config(model, dtype=dtype)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    groups: dict[tuple[LayerWork, tuple[Pattern, ...], int | None], list[int]] = {}
    try:
        for number in range(config.num_hidden_layers):
            groups.setdefault(read_layer(config, number, options, dtype), []).append(number)
    except AttributeError as error:
        fault = f"its configuration does not say what its attention is: {error}"
        raise ModelNotFoundError(model, (), fault) from None
    layers = tuple(
        predict_layers(chip, work, patterns, configured, numbers, length, options)
        for length in lengths
        for (work, patterns, configured), numbers in groups.items()
    )
    return ModelPrediction(str(model), chip, str(dtype).removeprefix("torch."), layers)


def read_layer(
    config: Any, number: int, options: Options, dtype: torch.dtype
) -> tuple[LayerWork, tuple[Pattern, ...], int | None]:
    """One layer's work and patterns, and the shortest prompt that is configured for it, if any."""
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    window = window_of(config, number)
    given: SparseConfig = options.sparse_config
    given.check_site(number, heads, kv_heads)
    default = builtin_default(DEVICE_TYPE, window, max_loss=options.max_loss)
    patterns = tuple(given.pattern(number, head) or default for head in range(heads))
    work = layer_work(
        patterns, dtype=dtype, head_dim=dim, value_dim=dim, kv_heads=kv_heads, window=window
    )
    shortest = options.min_seq_len
    return work, patterns, given.effective(number).min_seq_len if shortest is None else shortest


def window_of(config: Any, number: int) -> int:
    """The sliding window of a layer in tokens, 0 for none."""
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None) or 0
    if kinds is None:
        return window if getattr(config, "use_sliding_window", True) else 0
    return window if kinds[number] == "sliding_attention" else 0


def predict_layers(
    chip: Chip,
    work: LayerWork,
    patterns: tuple[Pattern, ...],
    configured: int | None,
    numbers: list[int],
    length: int,
    options: Options,
) -> LayerPrediction:
    """Equal layers at one length."""
    found = predict(chip, work, keys=length)
    least = LeastLengths(configured, 1) if configured is not None else least_lengths(chip, work)
    reason = reason_for_dense(found, work, least.keys, length, options)
    return LayerPrediction(
        layers=len(numbers),
        numbers=tuple(numbers),
        patterns=patterns_of_heads([str(pattern) for pattern in patterns]),
        length=length,
        runs="dense" if reason else "sparse",
        reason=reason,
        density=found.density,
        dense_ms=1e3 * found.dense,
        sparse_ms=1e3 * found.sparse,
        estimate_ms=1e3 * found.estimate,
        plan_ms=1e3 * found.plan,
        attention_ms=1e3 * found.attention,
        host_ms=1e3 * found.host,
    )


def reason_for_dense(
    found: Prediction, work: LayerWork, shortest: int, length: int, options: Options
) -> str:
    """Why a layer would run dense, in words; "" for sparse."""
    if not known(work):
        return "the cost of its estimator is not known"
    if all(part.name.startswith("dense(") for part in work.patterns) and not work.window:
        return "the config keeps every head of this layer dense"
    if length < shortest:
        return f"{length} keys, sparse from {shortest} on"
    return ""


def rates_in_words(chip: Chip) -> str:
    """Where the rates of a chip come from."""
    if chip.measured:
        return f"its rates were measured on {chip.measured}"
    return "its rates are assumed: nobody has measured them on this chip"


def render_prediction(prediction: ModelPrediction) -> str:
    """A row per length and kind of layer; below, the sums, and what the figures are."""
    table = Table()
    columns = ("tokens", "layers", "runs", "density", "dense ms", "sparse ms", "x dense")
    for column in (*columns, "estimate + plan + attention; host", "patterns or reason"):
        table.add_column(column, overflow="fold")
    for layer in prediction.layers:
        parts = f"{layer.estimate_ms:.2f} + {layer.plan_ms:.2f} + {layer.attention_ms:.2f}"
        table.add_row(
            str(layer.length),
            str(layer.layers),
            layer.runs,
            span([layer.density]),
            f"{layer.dense_ms:.2f}",
            f"{layer.sparse_ms:.2f}",
            f"{layer.dense_ms / layer.sparse_ms:.2f}",
            f"{parts}; {layer.host_ms:.2f}",
            layer.patterns + (f"\nruns dense: {layer.reason}" if layer.reason else ""),
        )
    chip = prediction.chip
    lines = [
        f"PREDICTED for {chip.name}, {prediction.dtype}, one prompt: no GPU was asked, and "
        f"{rates_in_words(chip)}. Times are of one layer's attention; densities are usual ones."
    ]
    for length in prediction.lengths:
        dense, chosen = prediction.totals(length)
        lines.append(
            f"{length} tokens: all attention {dense:.1f} ms dense, {chosen:.1f} ms as chosen, "
            f"{dense / chosen:.2f}x"
        )
    return render(table) + "\n".join(lines)
