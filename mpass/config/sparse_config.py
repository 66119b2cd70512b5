"""SparseConfig: which pattern, with which parameters, each head of each layer uses.

Everything here is frozen and hashable. Reading and writing files is in mpass.config.json_format,
the precedence among decorators, options and files in mpass.resolve.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from mpass.errors import ConfigMismatchError, OptionValueError
from mpass.patterns.base import Pattern, find_pattern

DEFAULT_PATTERNS = {"cpu": "union", "cuda": "vertical_slash"}
"""What a head gets that nothing configures: of the patterns that have a fused estimator on that
device, the one that loses least (docs/patterns/union.md)."""

EXACT_WINDOW = 4096
"""Sliding windows up to this many tokens are computed whole where nothing is configured."""

MAX_COUNT = 4096
"""Layers, and heads per layer, that a config may name: far above any model, far below a typo."""

SPAN = re.compile(r"(\d{1,9})(?:(-)(\d{1,9})?)?", re.ASCII)
"""`7`, `0-3` or `16-`."""

PatternLike: TypeAlias = Pattern | str
HeadsLike: TypeAlias = PatternLike | Sequence[PatternLike] | Mapping[Any, PatternLike]


@dataclass(frozen=True, order=True)
class Span:
    """A run of layers or heads, `first` to `last`, both included; last None for all that follow.

    Written `7`, `0-3` or `16-`.
    """

    first: int
    last: int | None

    def __contains__(self, number: object) -> bool:
        if not isinstance(number, int):
            return False
        return self.first <= number and (self.last is None or number <= self.last)

    def overlaps(self, other: Span) -> bool:
        """Whether the two have a number in common."""
        return (self.last is None or other.first <= self.last) and (
            other.last is None or self.first <= other.last
        )

    def __str__(self) -> str:
        if self.last is None:
            return f"{self.first}-"
        return str(self.first) if self.first == self.last else f"{self.first}-{self.last}"


@dataclass(frozen=True)
class LayerConfig:
    """What one layer, or each layer of a span, uses.

    default: pattern of the heads that `heads` does not name; None for the config's default.
    heads: (query head, pattern), ascending. num_heads: how many query heads the layer must have,
    if that is known (a list names every head, so it fixes the number).
    min_seq_len: shorter prompts keep this layer dense; None for the config's own value.
    records: numbers per head that a search left behind and that decide nothing, the score last.
    """

    default: Pattern | None = None
    heads: tuple[tuple[int, Pattern], ...] = ()
    num_heads: int | None = None
    min_seq_len: int | None = None
    records: tuple[tuple[int, tuple[int | float, ...]], ...] = field(default=(), compare=False)

    def __post_init__(self) -> None:
        numbers = [head for head, _ in self.heads]
        if numbers != sorted(set(numbers)):
            raise OptionValueError("config heads", numbers, "every head once, ascending")
        check_count("config heads", max(numbers, default=0), lowest=0)
        check_count("config num_heads", self.num_heads)
        check_length("config min_seq_len", self.min_seq_len)

    def pattern(self, head: int) -> Pattern | None:
        """The pattern of a query head, or None where the layer leaves it open."""
        return dict(self.heads).get(head, self.default)

    def check_heads(self, num_heads: int, head_offset: int | None, where: str) -> None:
        """Raise ConfigMismatchError unless a site with these heads can belong to this layer.

        head_offset: first head of the slice that the site owns, or None if it owns all heads.
        """
        end = (head_offset or 0) + num_heads
        named = max((head + 1 for head, _ in self.heads), default=0)
        if self.num_heads is None:
            fits = head_offset is not None or named <= end
        else:
            fits = end <= self.num_heads if head_offset is not None else end == self.num_heads
        if not fits:
            owned = f"{num_heads} query heads" + (f" from {head_offset} on" if head_offset else "")
            raise ConfigMismatchError(
                f"{where} has {owned}, the config names {self.num_heads or named}; use a config "
                "made for this model, or head_offset= if the module owns a slice of the heads"
            )


@dataclass(frozen=True, init=False)
class SparseConfig:
    """A pattern per layer and head, and a default for what is not named.

    default: pattern of every head that `layers` leaves open; None for what comes after this config
    in the order of precedence, in the end the built-in default.
    layers: per layer or span of layers (`3`, `"0-1"`, `"16-"`, `range(4)`) a pattern for all heads,
    a list with one per query head, a mapping from head (or span of heads) to pattern, or a
    LayerConfig. No two may overlap. Kept as a sorted tuple.
    num_layers, num_heads, num_kv_heads: of the model this was made for, if known; checked.
    min_seq_len: shorter prompts stay dense; None leaves it to the options.
    provenance: where the config comes from, as JSON values; decides nothing and is not compared.
    """

    default: Pattern | None
    layers: tuple[tuple[Span, LayerConfig], ...]
    num_layers: int | None
    num_heads: int | None
    num_kv_heads: int | None
    min_seq_len: int | None
    provenance: tuple[tuple[str, Any], ...] = field(compare=False)

    def __init__(
        self,
        default: PatternLike | None = None,
        layers: Mapping[Any, HeadsLike | LayerConfig] | Iterable[tuple[Any, LayerConfig]] = (),
        *,
        num_layers: int | None = None,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        min_seq_len: int | None = None,
        provenance: Mapping[str, Any] | Iterable[tuple[str, Any]] = (),
    ) -> None:
        entries = layers.items() if isinstance(layers, Mapping) else layers
        spans = [(as_span(key, "layer"), as_layer(value)) for key, value in entries]
        spans.sort(key=first)
        for (span, _), (following, _) in itertools.pairwise(spans):
            if span.overlaps(following):
                raise OptionValueError(
                    "config.layers", f"{span} and {following}", "every layer once"
                )
        check_count("config.num_layers", num_layers)
        check_count("config.num_heads", num_heads)
        check_count("config.num_kv_heads", num_kv_heads)
        check_length("config.min_seq_len", min_seq_len)
        values = {
            "default": None if default is None else as_pattern(default),
            "layers": tuple(spans),
            "num_layers": num_layers,
            "num_heads": num_heads,
            "num_kv_heads": num_kv_heads,
            "min_seq_len": min_seq_len,
            "provenance": tuple(dict(provenance).items()),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    def layer(self, number: int) -> LayerConfig:
        """What one layer uses; an empty LayerConfig if no span holds it. -1: an unknown layer."""
        for span, layer in self.layers:
            if number in span:
                return layer
        return LayerConfig()

    def effective(self, number: int) -> LayerConfig:
        """What one layer uses, the config's own defaults filled in."""
        own = self.layer(number)
        length = self.min_seq_len if own.min_seq_len is None else own.min_seq_len
        return LayerConfig(own.default or self.default, own.heads, own.num_heads, length)

    def pattern(self, layer: int, head: int) -> Pattern | None:
        """The pattern of one query head, or None where the config leaves it open."""
        return self.layer(layer).pattern(head) or self.default

    def patterns(self, layer: int, num_heads: int) -> tuple[Pattern, ...]:
        """The pattern of each query head of a layer, the built-in default where it is open.

        Raises ConfigMismatchError if the model has another number of heads or of layers.
        """
        self.check_site(layer, num_heads)
        default = builtin_default()
        return tuple(self.pattern(layer, head) or default for head in range(num_heads))

    def check_site(
        self,
        layer: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        *,
        head_offset: int | None = None,
    ) -> None:
        """Raise ConfigMismatchError if an attention of that layer and heads is of another model."""
        if self.num_layers is not None and layer >= self.num_layers:
            raise ConfigMismatchError(
                f"the model has a layer {layer}, the config is for {self.num_layers} layers; "
                "use a config made for this model"
            )
        where = f"layer {layer}" if layer >= 0 else "an attention of unknown layer"
        LayerConfig(num_heads=self.num_heads).check_heads(num_heads, head_offset, where)
        self.layer(layer).check_heads(num_heads, head_offset, where)
        expected = self.num_kv_heads
        known = None not in (expected, num_kv_heads) and head_offset is None
        if known and expected != num_kv_heads:
            raise ConfigMismatchError(
                f"{where} has {num_kv_heads} kv heads, the config is for {expected}; "
                "use a config made for this model"
            )

    def check_num_layers(self, num_layers: int) -> None:
        """Raise ConfigMismatchError if the model has fewer or more layers than this is made for."""
        if self.num_layers is not None and num_layers != self.num_layers:
            raise ConfigMismatchError(
                f"the model has {num_layers} layers, the config is for {self.num_layers} layers; "
                "use a config made for this model"
            )

    def with_default(self, default: Pattern | None) -> SparseConfig:
        """This config, with a default for the heads that it leaves open."""
        if self.default is not None or default is None:
            return self
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        return SparseConfig(**{**values, "default": default})

    @property
    def depends_on_layer(self) -> bool:
        """Whether a site must know its layer to find its patterns."""
        return bool(self.layers) or self.num_layers is not None

    @classmethod
    def load(cls, path: str | Path) -> SparseConfig:
        """Read our own JSON, MInference's per-head file, or Qwen's `config_1m.json`.

        Raises ConfigFileError, which lists everything that is wrong with the file.
        """
        from mpass.config.json_format import load_config

        return load_config(Path(path))

    def save(self, path: str | Path) -> None:
        """Write our own JSON; a reader sees the old file or the new one, never a part."""
        from mpass.config.json_format import save_config

        save_config(self, Path(path))

    @classmethod
    def from_json(cls, text: str) -> SparseConfig:
        """The config that a JSON text in any of the formats of `load` describes."""
        from mpass.config.json_format import parse_config

        return parse_config(text, "<text>")

    def to_json(self) -> str:
        """Our own format, one layer a line."""
        from mpass.config.json_format import config_to_json

        return config_to_json(self)

    def to_minference(self) -> str:
        """MInference's per-head JSON. Raises ConfigFileError for what that format cannot say."""
        from mpass.config.minference_format import config_to_minference

        return config_to_minference(self)


def first(entry: tuple[Span, LayerConfig]) -> int:
    """Where a span starts: the order of `SparseConfig.layers`."""
    return entry[0].first


def builtin_default(device: str = "cpu", window: int = 0) -> Pattern:
    """The pattern of a head that nothing configures.

    device: type of the device; window: sliding window of the attention in tokens, 0 for none.
    """
    name = DEFAULT_PATTERNS.get(device, "vertical_slash")
    return find_pattern("dense" if 0 < window <= EXACT_WINDOW else name)()


def as_pattern(value: object) -> Pattern:
    """A pattern object from one, or from its name with default parameters."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return find_pattern(value)()
    raise OptionValueError("pattern", value, "a pattern object or the name of one")


def as_layer(value: HeadsLike | LayerConfig) -> LayerConfig:
    """A LayerConfig from a pattern for all heads, a list with one per head, or a mapping."""
    if isinstance(value, LayerConfig):
        return value
    if isinstance(value, Pattern | str):
        return LayerConfig(default=as_pattern(value))
    if isinstance(value, Mapping):
        return LayerConfig(heads=head_patterns(value))
    if isinstance(value, Sequence) and len(value):
        check_count("config heads", len(value))
        patterns = tuple(enumerate(as_pattern(item) for item in value))
        return LayerConfig(heads=patterns, num_heads=len(patterns))
    raise OptionValueError("config.layers", value, "a pattern, one per head, or {head: pattern}")


def head_patterns(mapping: Mapping[Any, PatternLike]) -> tuple[tuple[int, Pattern], ...]:
    """`{head or span of heads: pattern}` as sorted pairs."""
    heads: dict[int, Pattern] = {}
    for key, value in mapping.items():
        span = as_span(key, "head")
        if span.last is None:
            raise OptionValueError("config heads", key, "a head or a closed span like '0-3'")
        for head in range(span.first, span.last + 1):
            if head in heads:
                raise OptionValueError("config heads", head, "every head once")
            heads[head] = as_pattern(value)
    return tuple(sorted(heads.items(), key=lambda item: item[0]))


def as_span(key: object, what: str) -> Span:
    """A Span from `3`, `"3"`, `"0-3"`, `"16-"` or `range(4)`. what: "layer" or "head"."""
    span = None
    if isinstance(key, Span):
        span = key
    elif isinstance(key, int) and not isinstance(key, bool):
        span = Span(key, key)
    elif isinstance(key, range) and key.step == 1 and len(key):
        span = Span(key[0], key[-1])
    elif isinstance(key, str) and (match := SPAN.fullmatch(key)):
        start, dash, stop = match.groups()
        last = start if dash is None else stop
        span = Span(int(start), int(last) if last else None)
    allowed = f"a {what} from 0 to {MAX_COUNT - 1}, or a span of them like '0-3' or '16-'"
    if span is None or span.first < 0 or max(span.first, span.last or 0) >= MAX_COUNT:
        raise OptionValueError(f"config {what}s", key, allowed)
    if span.last is not None and span.last < span.first:
        raise OptionValueError(f"config {what}s", key, allowed)
    return span


def check_count(name: str, value: object, *, lowest: int = 1) -> None:
    """Raise OptionValueError unless a number of layers or heads is None or sensible."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= MAX_COUNT:
        raise OptionValueError(name, value, f"an int from {lowest} to {MAX_COUNT}")


def check_length(name: str, value: object) -> None:
    """Raise OptionValueError unless a length in tokens is None or an int of 0 or more."""
    if value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise OptionValueError(name, value, "a number of tokens, 0 or more")
