"""Which lowering runs an op: generated C++ on a CPU, generated Triton on a GPU, plain torch else.

A lowering is found by its folder: every package beside this file that exports a `LOWERING`, and the
modules that entry points of the group `mpass.lowerings` name. Nobody else asks for the type of a
device.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil

import torch

from mpass.lowering.device import REFERENCE, Lowering
from mpass.lowering.inputs import AttentionInputs

ENTRY_POINTS = "mpass.lowerings"
"""Entry-point group of packages that bring a lowering; each names its `LOWERING`."""

_added: dict[str, Lowering] = {}


@functools.cache
def discover_lowerings() -> tuple[Lowering, ...]:
    """The lowerings of this folder, then those of other packages."""
    package = importlib.import_module("mpass.lowering")
    found = []
    for module in pkgutil.iter_modules(package.__path__):
        if module.ispkg:
            loaded = importlib.import_module(f"{package.__name__}.{module.name}")
            found += [loaded.LOWERING] if hasattr(loaded, "LOWERING") else []
    entries = importlib.metadata.entry_points(group=ENTRY_POINTS)
    return (*found, *(entry.load() for entry in entries))


def register_lowering(lowering: Lowering) -> None:
    """Add a lowering by hand; it takes the place of another one for the same device."""
    _added[lowering.device] = lowering


def lowerings() -> dict[str, Lowering]:
    """All lowerings by the type of their device; plain torch, which has none, is not among them."""
    return {own.device: own for own in discover_lowerings()} | _added


def find_lowering(name: str) -> Lowering:
    """The lowering of a name, plain torch included; raises KeyError."""
    return {own.name: own for own in (*lowerings().values(), REFERENCE)}[name]


def device_lowering(device: torch.device | str) -> Lowering:
    """The lowering that is meant for a device, whatever it serves; plain torch where none is."""
    kind = device if isinstance(device, str) else device.type
    return lowerings().get(kind, REFERENCE)


def choose_lowering(inputs: AttentionInputs) -> Lowering:
    """The lowering that serves an attention; reads dtypes, devices and static shapes only."""
    lowering = device_lowering(inputs.query.device)
    return REFERENCE if lowering.serves(inputs) else lowering


def reason_against(inputs: AttentionInputs) -> str:
    """Why no lowering serves an attention so that sparse could pay, in words, or ""."""
    lowering = device_lowering(inputs.query.device)
    if lowering is REFERENCE:
        return f"no kernels are generated for device {inputs.query.device.type!r}"
    return "" if lowering.fallback else lowering.serves(inputs) or ""
