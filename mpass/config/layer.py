"""What one layer uses, and what a config holds beside its layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mpass.config.pattern_text import parse_pattern
from mpass.config.spans import MAX_COUNT, Span, as_span
from mpass.errors import ConfigMismatchError, OptionValueError
from mpass.lowering.tiles import Grid, as_grid
from mpass.patterns.base import Pattern

PatternLike: TypeAlias = Pattern | str
HeadsLike: TypeAlias = PatternLike | Sequence[PatternLike] | Mapping[Any, PatternLike]


@dataclass(frozen=True)
class LayerConfig:
    """What one layer, or each layer of a span, uses.

    default: the pattern of the heads that `heads` does not name; None for the config's default.
    heads: pairs of a query head and its pattern, in ascending order.
    num_heads: the number of query heads that the layer must have, if that is known. A list names
        every head, so that it fixes the number.
    min_seq_len: shorter prompts keep this layer dense; None for the config's own value.
    records: numbers per head that a search left behind and that decide nothing, the score last.
    grid: how the tokens of this layer lie in a picture or a video; None for options["grid"].

    Raises OptionValueError for a head that is named twice or a number that is out of range.
    """

    default: Pattern | None = None
    heads: tuple[tuple[int, Pattern], ...] = ()
    num_heads: int | None = None
    min_seq_len: int | None = None
    records: tuple[tuple[int, tuple[int | float, ...]], ...] = field(default=(), compare=False)
    grid: Grid | None = None

    def __post_init__(self) -> None:
        if self.grid is not None and not isinstance(self.grid, Grid):
            object.__setattr__(self, "grid", as_grid(self.grid))
        numbers = [head for head, _ in self.heads]
        if numbers != sorted(set(numbers)):
            raise OptionValueError("config heads", numbers, "every head once, ascending")
        check_count("config heads", max(numbers, default=0), lowest=0)
        check_count("config num_heads", self.num_heads)
        check_length("config min_seq_len", self.min_seq_len)

    def pattern(self, head: int) -> Pattern | None:
        """The pattern of a query head, or None where the layer leaves it open."""
        return dict(self.heads).get(head, self.default)

    def check_heads(
        self, num_heads: int, head_offset: int | None, where: str, total: int | None = None
    ) -> None:
        """Raise ConfigMismatchError unless a site with these heads can belong to this layer.

        head_offset: first head of the slice that the site owns, or None if it owns all heads.
        total: the number of heads of the whole layer, where a slice knows it. What is refused is
        then the same for all slices: a rank that refused alone would leave the others waiting.
        """
        end = (head_offset or 0) + num_heads
        named = max((head + 1 for head, _ in self.heads), default=0)
        if total is not None:
            fits = named <= total and self.num_heads in (None, total) and end <= total
        elif self.num_heads is None:
            fits = head_offset is not None or named <= end
        else:
            fits = end <= self.num_heads if head_offset is not None else end == self.num_heads
        if not fits:
            owned = f"{num_heads} query heads" + (f" from {head_offset} on" if head_offset else "")
            advice = ", or head_offset= if the module owns a slice of the heads"
            if total is not None:
                owned, advice = f"{total} query heads, and here {owned}", ""
            raise ConfigMismatchError(
                f"{where} has {owned}, the config names {self.num_heads or named}; use a config "
                f"made for this model{advice}"
            )


@dataclass(frozen=True)
class ConfigFields:
    """What a SparseConfig holds, as its formats read and write it.

    default: pattern of every head that `layers` leaves open; None for what comes after this config
    in the order of precedence, in the end the built-in default.
    layers: (span of layers, what each of them uses), ascending.
    num_layers, num_heads, num_kv_heads: of the model this was made for, if known.
    min_seq_len: shorter prompts stay dense; None leaves it to the options.
    provenance: where the config comes from, as JSON values; decides nothing and is not compared.
    """

    default: Pattern | None = None
    layers: tuple[tuple[Span, LayerConfig], ...] = ()
    num_layers: int | None = None
    num_heads: int | None = None
    num_kv_heads: int | None = None
    min_seq_len: int | None = None
    provenance: tuple[tuple[str, Any], ...] = field(default=(), compare=False)

    def layer(self, number: int) -> LayerConfig:
        """What one layer uses; an empty LayerConfig if no span holds it. -1: an unknown layer."""
        for span, layer in self.layers:
            if number in span:
                return layer
        return LayerConfig()


def as_pattern(value: object) -> Pattern:
    """A pattern object from one, or from text: `a_shape`, `a_shape(64, 128)`.

    Raises UnknownPatternError, PatternValueError, and OptionValueError for anything else.
    """
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return parse_pattern(value)
    if isinstance(value, type) and issubclass(value, Pattern):
        raise OptionValueError("pattern", value, f"an object of the class: {value.__name__}()")
    raise OptionValueError("pattern", value, "a pattern, or text such as 'a_shape(64, 128)'")


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
