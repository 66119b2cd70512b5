"""All patterns by name: the files of mpass.patterns, and those of other packages.

A pattern registers itself by the decorator `register_pattern`. Files of the folder above and the
modules named by entry points of the group `mpass.patterns` are found by `discover_patterns`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata
import pkgutil
from typing import TypeVar

from mpass.errors import UnknownPatternError
from mpass.patterns.base.op import define_index_op
from mpass.patterns.base.pattern import Pattern

ENTRY_POINTS = "mpass.patterns"
"""Entry-point group of packages that bring patterns of their own; each names a module."""

_registry: dict[str, type[Pattern]] = {}

P = TypeVar("P", bound=Pattern)


def register_pattern(cls: type[P]) -> type[P]:
    """Add a pattern to the registry and define its op `minference::<name>`; a class decorator."""
    _registry[cls.name] = cls
    define_index_op(cls)
    return cls


@functools.cache
def discover_patterns() -> None:
    """Import every pattern: the files of this folder, then those that entry points name."""
    package = importlib.import_module("mpass.patterns")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "base":
            importlib.import_module(f"mpass.patterns.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        entry.load()


def registered_patterns() -> dict[str, type[Pattern]]:
    """All patterns by name."""
    discover_patterns()
    return dict(_registry)


def find_pattern(name: str) -> type[Pattern]:
    """The pattern of that name; raises UnknownPatternError."""
    patterns = registered_patterns()
    if name not in patterns:
        raise UnknownPatternError(name, patterns)
    return patterns[name]
