"""What a measurement is of: the model, its options, versions, the machine, the day."""

from __future__ import annotations

import datetime
import importlib.metadata
import platform
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from mpass import __version__
from mpass.config.sparse_config import SparseConfig
from mpass.lowering.cpu.cost_constants import cpu_model

Provenance = tuple[tuple[str, str], ...]
"""Names and values, in the order in which to show them."""


def describe(
    model: Callable[..., Any],
    options: Mapping[str, Any] | None,
    about: Mapping[str, str] | None = None,
) -> Provenance:
    """Where figures come from.

    about: what the caller knows besides, as the name of the model and of the prompt; it stands
    first.
    """
    original = getattr(model, "_orig_mod", model)
    rows = dict(about or {})
    rows.setdefault("model", getattr(original, "__name__", type(original).__name__))
    rows |= of_weights(original)
    chosen = ", ".join(option_in_words(name, value) for name, value in (options or {}).items())
    rows["options"] = chosen or "defaults"
    rows["versions"] = versions()
    rows["processor"] = processor(rows.get("device", "cpu"))
    rows["date"] = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return tuple(rows.items())


def option_in_words(name: str, value: object) -> str:
    """`pattern a_shape(64, 128)`; a config by its default and the layers that it names."""
    if not isinstance(value, SparseConfig):
        return f"{name} {value}"
    named = ", ".join(str(span) for span, _ in value.layers)
    layers = f", layers {named}" if named else ""
    return f"{name} of {value.default or 'the default pattern'}{layers}"


def of_weights(model: object) -> dict[str, str]:
    """Class, dtype and device of a module."""
    if not isinstance(model, nn.Module):
        return {}
    found = {"class": type(model).__name__}
    first = next(model.parameters(), None)
    if first is not None:
        count = sum(parameter.numel() for parameter in model.parameters())
        found["parameters"] = f"{count / 1e6:.1f} M"
        found["dtype"] = str(first.dtype).removeprefix("torch.")
        found["device"] = str(first.device)
    return found


def versions() -> str:
    """`mpass 0.1.0, torch 2.13.0, Python 3.11.7` and transformers where it is installed."""
    known = [f"mpass {__version__}", f"torch {torch.__version__}"]
    try:
        known.append(f"transformers {importlib.metadata.version('transformers')}")
    except importlib.metadata.PackageNotFoundError:
        pass
    return ", ".join([*known, f"Python {platform.python_version()}"])


def processor(device: str) -> str:
    """What computed: the CPU with the threads in use, or the GPU."""
    if device.startswith("cuda") and torch.cuda.is_available():
        return torch.cuda.get_device_name(device)
    threads = torch.get_num_threads()
    return f"{cpu_model()}, {threads} thread{'s' * (threads != 1)}"
