"""What a config was searched on: hashes of model and inputs, versions, results."""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import statistics
from collections.abc import Sequence
from typing import Any

import torch

from mpass.calibration.outcome import Calibration
from mpass.calibration.probe import Input
from mpass.calibration.settings import Settings
from mpass.patterns.base import Pattern


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
    from mpass import __version__

    at = float(outcome.losses.gather(2, outcome.chosen[..., None]).sum())
    parameter = next(iter(model.parameters()), torch.zeros(()))
    return {
        "made_by": f"mpass {__version__} calibrate, torch {torch.__version__}",
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "model": identify(model),
        "dtype": str(parameter.dtype).removeprefix("torch."),
        "device": parameter.device.type,
        "threads": torch.get_num_threads(),
        "inputs": [hash_tokens(item) for item in items],
        "settings": dataclasses.asdict(settings),
        "candidates": [str(candidate) for candidate in outcome.candidates],
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
