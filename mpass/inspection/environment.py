"""What mpass runs on: the text that a bug report should begin with."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from pathlib import Path

import torch

from mpass import __version__
from mpass.files import cache_dir
from mpass.lowering.dispatch import lowerings

PACKAGES = ("triton", "transformers", "sympy", "jinja2", "jsonschema", "rich", "typer")
"""Packages whose versions decide something here, beside torch."""

VARIABLES = ("MPASS_CACHE", "MPASS_DEBUG", "MPASS_STRICT", "CXX", "TORCH_LOGS", "OMP_NUM_THREADS")
"""Environment variables that change what mpass does."""


def environment() -> dict[str, str]:
    """Names and values, in the order in which to print them. Nothing is compiled or timed."""
    return dict([*versions(), *processor(), *lowering_rows(), *caches(), *variables()])


def versions() -> Iterator[tuple[str, str]]:
    """mpass, Python, torch and the packages beside them."""
    yield "mpass", f"{__version__} ({Path(__file__).parents[1]})"
    yield "python", f"{platform.python_version()} on {platform.platform()}"
    yield "torch", torch.__version__
    for package in PACKAGES:
        try:
            yield package, importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            yield package, "not installed"
    yield "plugins", ", ".join(plugins()) or "none"


def plugins() -> list[str]:
    """Patterns and lowerings of other packages, by entry point."""
    return [
        f"{entry.name} ({entry.value})"
        for group in ("mpass.patterns", "mpass.lowerings")
        for entry in importlib.metadata.entry_points(group=group)
    ]


def processor() -> Iterator[tuple[str, str]]:
    """The processor, what it can do, and the accelerators beside it."""
    from mpass.lowering.cpu.cost_constants import cpu_model
    from mpass.lowering.cpu.support import instruction_sets

    yield "processor", f"{cpu_model()}, {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    yield "instruction sets", ", ".join(instruction_sets()) if is_x86() else "none of ours"
    for i in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(i)
        size = found.total_memory / 2**30
        yield f"cuda:{i}", f"{found.name}, sm_{found.major}{found.minor}, {size:.0f} GiB"


def is_x86() -> bool:
    """Whether the generated C++ is for this kind of processor."""
    return platform.machine().lower() in ("x86_64", "amd64")


def lowering_rows() -> Iterator[tuple[str, str]]:
    """What each kind of device runs, and what a head gets there that nothing configures."""
    for name, lowering in lowerings().items():
        known = lowering.least_lengths is not None
        start = (
            "the length that pays, as predicted" if known else f"{lowering.shortest_prompt} tokens"
        )
        yield f"lowering {name}", f"{lowering.default_pattern} from {start} on"


def caches() -> Iterator[tuple[str, str]]:
    """Where kernels and constants are kept, and how much lies there."""
    folder = cache_dir()
    files = [path for path in folder.rglob("*") if path.is_file()] if folder.is_dir() else []
    size = sum(path.stat().st_size for path in files) / 2**20
    yield "cache", f"{folder} ({len(files)} files, {size:.1f} MiB)"


def variables() -> Iterator[tuple[str, str]]:
    """Environment variables that are set."""
    for name in VARIABLES:
        if name in os.environ:
            yield name, os.environ[name]
