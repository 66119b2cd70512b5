"""All patterns by name: the files of mpass.patterns, and those of other packages.

A pattern registers itself by the decorator `register_pattern`. Files of the folder above and the
modules named by entry points of the group `mpass.patterns` are found by `discover_patterns`. An
entry point should have the name of its pattern, so that a failure can be told by that name.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import pkgutil
import sys
import warnings
from typing import TypeVar

import torch

from mpass.errors import (
    PatternClassError,
    PatternLoadError,
    PatternNameTakenError,
    UnknownPatternError,
)
from mpass.lowering.define import NAMESPACE
from mpass.patterns.base.op import define_index_op
from mpass.patterns.base.parameters import parameter_kinds
from mpass.patterns.base.pattern import Pattern

ENTRY_POINTS = "mpass.patterns"
"""Entry-point group of packages that bring patterns of their own; each names a module."""

_registry: dict[str, type[Pattern]] = {}

_failures: dict[str, PatternLoadError] = {}
"""Entry points that could not be loaded, by name."""

P = TypeVar("P", bound=Pattern)


def register_pattern(cls: type[P]) -> type[P]:
    """Add a pattern to the registry and define its op `minference::<name>`; a class decorator.

    Raises PatternClassError for a class that is incomplete, and PatternNameTakenError for a name
    that another class has. The same class may be registered again, as a reload of its module does.
    """
    check_class(cls)
    known = _registry.get(cls.name)
    if known is not None and origin(known) != origin(cls):
        raise PatternNameTakenError(cls.name, origin(cls), origin(known))
    if known is None and hasattr(getattr(torch.ops, NAMESPACE), cls.name):
        raise PatternNameTakenError(cls.name, origin(cls), f"the op {NAMESPACE}::{cls.name}")
    define_index_op(cls)
    _registry[cls.name] = cls
    return cls


def check_class(cls: type[Pattern]) -> None:
    """Raise PatternClassError unless the class has all that a pattern needs."""
    if not issubclass(cls, Pattern):
        remedy = "derive it from mpass.patterns.base.Pattern"
        raise PatternClassError(cls, "it is no subclass of Pattern", remedy)
    if not cls.name:
        remedy = 'add a line such as `name: ClassVar[str] = "my_pattern"`'
        raise PatternClassError(cls, "it has no name", remedy)
    if not cls.name.isidentifier():
        remedy = "use letters, digits and underscores, as in a Python name"
        raise PatternClassError(cls, f"{cls.name!r} cannot be the name of an op", remedy)
    if "__dataclass_fields__" not in vars(cls):
        remedy = "put @dataclass(frozen=True) below @register_pattern"
        raise PatternClassError(cls, "it is not a dataclass", remedy)
    parameter_kinds(cls)
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            remedy = "give it one: every pattern can be used by its name alone"
            raise PatternClassError(cls, f"field {field.name!r} has no default", remedy)
    missing = [name for name in cls.required if not is_defined(cls, name)]
    if missing:
        remedy = f"a {cls.mro()[1].__name__} needs {', '.join(cls.required)}"
        raise PatternClassError(cls, f"it does not define {', '.join(missing)}", remedy)


def is_defined(cls: type[Pattern], name: str) -> bool:
    """Whether a class, or one of its bases below Pattern, defines an attribute."""
    return any(name in vars(base) for base in cls.__mro__[: cls.__mro__.index(Pattern)])


def origin(cls: type) -> str:
    """Module and name of a class; a module that runs as a script has the name of its file."""
    module = cls.__module__
    spec = getattr(sys.modules.get(module), "__spec__", None)
    return f"{spec.name if spec else module}.{cls.__qualname__}"


@functools.cache
def discover_patterns() -> None:
    """Import every pattern: the files of this folder, then those that entry points name.

    An entry point that fails is warned of and left out, so that a broken package does not take the
    other patterns away; asking for its pattern by name raises what was warned of.
    """
    package = importlib.import_module("mpass.patterns")
    for module in pkgutil.iter_modules(package.__path__):
        if module.name != "base":
            importlib.import_module(f"mpass.patterns.{module.name}")
    for entry in importlib.metadata.entry_points(group=ENTRY_POINTS):
        try:
            entry.load()
        except Exception as error:
            owner = entry.dist.name if entry.dist else "(unknown)"
            failure = PatternLoadError(entry.name, entry.value, owner, error)
            failure.__cause__ = error
            _failures[entry.name] = failure
            warnings.warn(str(failure), RuntimeWarning, stacklevel=2)


def registered_patterns() -> dict[str, type[Pattern]]:
    """All patterns by name."""
    discover_patterns()
    return dict(_registry)


def find_pattern(name: str) -> type[Pattern]:
    """The pattern of that name.

    Raises UnknownPatternError, or PatternLoadError if the entry point of that name has failed.
    """
    patterns = registered_patterns()
    if name in patterns:
        return patterns[name]
    if name in _failures:
        raise _failures[name]
    raise UnknownPatternError(name, patterns)


def serving_both_ways() -> str:
    """The patterns that serve attention to later keys, in words."""
    *most, last = (
        name
        for name, pattern in sorted(registered_patterns().items())
        if pattern.bidirectional and name != "dense"
    )
    return f"{', '.join(most)} and {last}"
