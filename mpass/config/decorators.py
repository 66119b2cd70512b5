"""`@mpass.configure(...)` and `with mpass.configure(...):` patterns where the model's code is.

What a decorator says travels in the captured graph itself: torch.fx.traceback.annotate puts it
into `node.meta["custom"]` of every node traced inside, outermost first. Nothing is global, eager
runs are not touched, and two models in one process keep their own. A decorated class also carries
it as an attribute, which is found through the graph's module stack where a graph break lost the
annotation.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
from torch import fx, nn
from torch.fx.traceback import annotate, preserve_node_meta

from mpass.config.json_format import JsonObject, layer_from_json, layer_to_json
from mpass.config.layer import LayerConfig, as_layer, as_pattern
from mpass.config.spans import Span, as_span
from mpass.errors import OptionValueError
from mpass.lowering.recorder import watch_compiled
from mpass.lowering.tiles import FIELDS, Grid, as_grid
from mpass.patterns.base import Pattern

PREFIX = "mpass.configure "
"""Start of the keys of our annotations; the rest is a number that makes each of them its own."""

ATTRIBUTE = "__mpass_configure__"
"""Class attribute of a decorated class: its own Override first, then those of its bases."""

ANNOTATION = "__mpass_annotation__"
"""Class attribute of a decorated class: the same as node metadata."""

T = TypeVar("T")
_numbers = itertools.count()


@dataclass(frozen=True)
class Override:
    """What one `configure` says.

    label: where it stands, in words; layers: which it applies to, None for every layer; layer:
    patterns and shortest prompt; head_offset: the first head that the module owns.
    """

    label: str
    layers: tuple[Span, ...] | None
    layer: LayerConfig
    head_offset: int | None

    def applies_to(self, layer: int) -> bool:
        """Whether it speaks about a layer; an unknown one (-1) is in no span."""
        return self.layers is None or any(layer in span for span in self.layers)


class Configure(AbstractContextManager[None]):
    """What `configure` returns outside of compiled code: a decorator, and an idle context.

    Entered while nothing is being traced it does nothing: a region belongs into the model's code.
    Compiled code that runs inside of it is warned of, once each time that it is entered.
    """

    def __init__(self, **settings: Any) -> None:
        self.settings = settings
        self.entered: list[AbstractContextManager[None]] = []
        make_override("configure", **settings)

    def __enter__(self) -> None:
        self.entered.append(watch_compiled(warn_of_region(sys._getframe(1))))
        self.entered[-1].__enter__()

    def __exit__(self, *error: Any) -> None:
        self.entered.pop().__exit__(*error)

    def __call__(self, target: T) -> T:
        name = getattr(target, "__qualname__", None)
        if isinstance(target, type):
            if not issubclass(target, nn.Module):
                raise OptionValueError("configure", target, "an nn.Module class or a function")
            return decorate_class(target, make_override(f"configure on {name}", **self.settings))
        if not callable(target) or name is None:
            raise OptionValueError("configure", target, "an nn.Module class or a function")
        marks = annotation(make_override(f"configure on {name}", **self.settings))
        return decorate_function(target, marks)


class ConfigureWarning(UserWarning):
    """A `with mpass.configure(...)` that compiled code inside of it knows nothing of."""


def warn_of_region(frame: FrameType) -> Callable[[], None]:
    """What warns, once, that the region which begins at a frame's line has no effect."""
    place = f"{frame.f_code.co_filename}:{frame.f_lineno}"

    @functools.cache
    def warn() -> None:
        warnings.warn(
            f"`with mpass.configure(...)` at {place} has no effect on the compiled code that runs "
            "inside of it: a region counts where it is traced. Move it into the code that is "
            "compiled, decorate the module's class, or pass options={'pattern': ...} or 'config' "
            "to the compile; a graph break inside of a region has the same effect",
            ConfigureWarning,
            stacklevel=2,
        )

    return warn


def configure(
    *,
    pattern: Pattern | str | Sequence[Any] | Mapping[Any, Any] | None = None,
    layers: int | str | Sequence[int | str] | None = None,
    heads: int | str | Sequence[int | str] | None = None,
    min_seq_len: int | None = None,
    head_offset: int | None = None,
    grid: Grid | Sequence[int] | str | None = None,
) -> Any:
    """Say which patterns the attentions inside use; a decorator or, in traced code, a context.

    On an nn.Module class, on a `forward`, or on a function that calls attention:

        @mpass.configure(pattern="a_shape", layers="16-")
        class Attention(nn.Module): ...

        with mpass.configure(pattern=[mpass.AShape(64, 512), "dense"], heads=[0, 1]): ...

    The innermost wins, head by head, and all of them win over options.

    pattern: a pattern or its name; a list with one per head (of `heads`, else of the layer); or a
        mapping from head to pattern.
    layers: the layers that it applies to, as numbers or spans like "0-3" and "16-"; all if not
        given.
    heads: the heads that it applies to, likewise. They are numbered over the whole layer.
    min_seq_len: the number of tokens from which on prompts are sparse.
    head_offset: the first head that the module owns, where it owns a slice of a layer's heads
        (tensor parallelism).
    grid: how their tokens lie in a picture or a video: a mpass.Grid, its shape, or "square".

    Raises OptionValueError and UnknownPatternError.
    """
    settings = {
        "pattern": as_json_values(pattern),
        "layers": layers,
        "heads": heads,
        "min_seq_len": min_seq_len,
        "head_offset": head_offset,
        "grid": grid_as_json(grid),
    }
    if is_traced():
        return region(**settings)
    return Configure(**settings)


def is_traced() -> bool:
    """Whether this runs for a graph: under Dynamo, or under torch.export without it."""
    return torch.compiler.is_dynamo_compiling() or torch.compiler.is_exporting()


def annotated(marks: dict[str, str]) -> AbstractContextManager[Any]:
    """The context in which nodes get annotations; torch.export without Dynamo drops them else."""
    return annotate(marks) if torch.compiler.is_dynamo_compiling() else kept_annotation(marks)


@contextmanager
def kept_annotation(marks: dict[str, str]) -> Iterator[None]:
    with preserve_node_meta(), annotate(marks):
        yield


@contextmanager
def region(**settings: Any) -> Iterator[None]:
    """The context that `configure` is inside of traced code."""
    with annotated(region_annotation(**settings)):
        yield


@torch._dynamo.assume_constant_result
def region_annotation(**settings: Any) -> dict[str, str]:
    """The annotation of a region; run, not traced."""
    return annotation(make_override("with configure", **settings))


def as_json_values(pattern: Any) -> Any:
    """Patterns as JSON values. Traced by Dynamo: an object made in traced code has no value yet."""
    if isinstance(pattern, Pattern):
        fields = {item.name: getattr(pattern, item.name) for item in dataclasses.fields(pattern)}
        return {"pattern": pattern.name, **fields}
    if isinstance(pattern, (list, tuple)):
        return [as_json_values(item) for item in pattern]
    if isinstance(pattern, dict) and "pattern" not in pattern:
        return {key: as_json_values(item) for key, item in pattern.items()}
    return pattern


def grid_as_json(grid: Any) -> Any:
    """A grid as JSON values, as `as_json_values` has patterns."""
    if not isinstance(grid, Grid):
        return grid
    return {name: getattr(grid, name) for name in FIELDS}


def make_override(
    label: str,
    *,
    pattern: Any,
    layers: Any,
    heads: Any,
    min_seq_len: Any,
    head_offset: Any,
    grid: Any = None,
) -> Override:
    """Check what `configure` was given. Patterns are as `as_json_values` makes them."""
    if pattern is None and min_seq_len is None and head_offset is None and grid is None:
        raise OptionValueError("configure", None, "pattern=, min_seq_len=, head_offset= or grid=")
    if head_offset is not None and (type(head_offset) is not int or head_offset < 0):
        raise OptionValueError("configure head_offset", head_offset, "a head, 0 or more")
    patterns = patterns_from_json(pattern)
    if heads is not None:
        numbers = head_numbers(heads)
        if isinstance(patterns, Mapping) or patterns is None:
            raise OptionValueError("configure heads", heads, "together with a pattern or a list")
        if not isinstance(patterns, list):
            patterns = [patterns] * len(numbers)
        if len(patterns) != len(numbers):
            raise OptionValueError(
                "configure pattern", f"a list of {len(patterns)}", f"one for each of heads={heads}"
            )
        patterns = dict(zip(numbers, patterns, strict=True))
    given = LayerConfig() if patterns is None else as_layer(patterns)
    return Override(
        label,
        None if layers is None else tuple(as_span(key, "layer") for key in listed(layers)),
        LayerConfig(
            *(given.default, given.heads, given.num_heads, min_seq_len),
            grid=None if grid is None else as_grid(grid),
        ),
        head_offset,
    )


def patterns_from_json(pattern: Any) -> Any:
    """Patterns from what `as_json_values` made of them; raises as as_pattern does."""
    from mpass.config.json_format import pattern_from_json

    if isinstance(pattern, list):
        return [patterns_from_json(item) for item in pattern]
    if isinstance(pattern, dict):
        if "pattern" in pattern:
            return pattern_from_json(pattern)
        return {key: patterns_from_json(item) for key, item in pattern.items()}
    return None if pattern is None else as_pattern(pattern)


def listed(keys: Any) -> list[Any]:
    """One key or several as a list."""
    return list(keys) if isinstance(keys, (list, tuple, set, frozenset)) else [keys]


def head_numbers(heads: Any) -> list[int]:
    """The heads that `heads=` names, in its order."""
    numbers: list[int] = []
    for span in (as_span(key, "head") for key in listed(heads)):
        if span.last is None:
            raise OptionValueError("configure heads", str(span), "a span with an end")
        numbers += range(span.first, span.last + 1)
    if len(set(numbers)) != len(numbers) or not numbers:
        raise OptionValueError("configure heads", heads, "every head once, at least one")
    return numbers


def annotation(override: Override) -> dict[str, str]:
    """An Override as node metadata: constants only, under a key of its own."""
    value = {
        "label": override.label,
        "layers": None if override.layers is None else [str(span) for span in override.layers],
        "layer": layer_to_json(override.layer),
        "head_offset": override.head_offset,
    }
    return {f"{PREFIX}{next(_numbers)}": json.dumps(value)}


def read_annotation(text: str) -> Override:
    """The Override that `annotation` wrote."""
    value = json.loads(text, object_pairs_hook=JsonObject)
    layers = value["layers"]
    return Override(
        value["label"],
        None if layers is None else tuple(as_span(key, "layer") for key in layers),
        layer_from_json(value["layer"]),
        value["head_offset"],
    )


def decorate_function(function: Any, marks: dict[str, str]) -> Any:
    """`function` with its nodes annotated when it is traced; eager calls pass straight on."""

    @functools.wraps(function)
    def configured(*args: Any, **kwargs: Any) -> Any:
        if not is_traced():
            return function(*args, **kwargs)
        with annotated(marks):
            return function(*args, **kwargs)

    return configured


def decorate_class(cls: Any, override: Override) -> Any:
    """Mark a class, and wrap its `forward` and those of subclasses to come; returns the class."""
    overrides = (override, *getattr(cls, ATTRIBUTE, ()))
    marks: dict[str, str] = {}
    for entry in reversed(overrides):  # a subclass's own is inside of its base's
        marks |= annotation(entry)
    setattr(cls, ATTRIBUTE, overrides)
    setattr(cls, ANNOTATION, marks)
    cls.forward = configured_forward(cls.forward)
    own = cls.__dict__.get("__init_subclass__")

    def init_subclass(subclass: Any, **kwargs: Any) -> None:
        if own is None:
            super(cls, subclass).__init_subclass__(**kwargs)
        else:
            own.__get__(None, subclass)(**kwargs)
        if "forward" in subclass.__dict__:
            subclass.forward = configured_forward(subclass.forward)

    cls.__init_subclass__ = classmethod(init_subclass)
    return cls


def configured_forward(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A `forward` with its nodes annotated by what the class of its instance carries.

    The instance's class, not the one that the forward is written in: what a subclass's decorator
    says must not be undone when it calls its base. Entered again, an annotation keeps its place.
    """

    @functools.wraps(forward)
    def configured(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        if not is_traced():
            return forward(self, *args, **kwargs)
        with annotated(getattr(type(self), ANNOTATION)):
            return forward(self, *args, **kwargs)

    return configured


def overrides_of(node: fx.Node, root: nn.Module | None) -> list[Override]:
    """The overrides that apply to a node, innermost first.

    root: the compiled module, which is not in the node's module stack. Classes whose annotation is
    missing (a graph break came between, or torch.export made the graph) count as outermost.
    """
    custom: Mapping[str, Any] = node.meta.get("custom") or {}
    found = [read_annotation(custom[key]) for key in custom if str(key).startswith(PREFIX)]
    stack = [entry[1] for entry in (node.meta.get("nn_module_stack") or {}).values()]
    if root is not None:
        stack.insert(0, type(root))
    missing: list[Override] = []
    for cls in stack:
        for override in reversed(getattr(cls, ATTRIBUTE, ())):
            if override not in found and override not in missing:
                missing.append(override)
    return [*reversed(found), *reversed(missing)]
