"""SparseConfig: which pattern, with which parameters, each head of each layer uses.

Everything here is frozen and hashable. Reading and writing files is in mpass.config.json_format,
the precedence among decorators, options and files in mpass.resolve.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpass.config.json_format import config_to_json, load_config, parse_config, save_config
from mpass.config.layer import (
    ConfigFields,
    HeadsLike,
    LayerConfig,
    PatternLike,
    as_layer,
    as_pattern,
    check_count,
    check_length,
)
from mpass.config.minference_format import config_to_minference
from mpass.config.promise import pattern_for_loss
from mpass.config.spans import Span, as_span
from mpass.errors import ConfigFileError, ConfigMismatchError, MpassError, OptionValueError
from mpass.lowering.dispatch import device_lowering
from mpass.patterns.base import Pattern, find_pattern

EXACT_WINDOW = 4096
"""Sliding windows up to this many tokens are computed whole where nothing is configured."""


@dataclass(frozen=True, init=False)
class SparseConfig(ConfigFields):
    """A pattern per layer and head, and a default for what is not named.

    default: the pattern of every head that `layers` leaves open; None for what comes after this
        config in the order of precedence, in the end the built-in default.
    layers: per layer or span of layers (`3`, `"0-1"`, `"16-"`, `range(4)`) a pattern for all heads,
        a list with one per query head, a mapping from head (or span of heads) to pattern, or a
        LayerConfig. No two may overlap. It is kept as a sorted tuple.
    num_layers: the number of layers of the model that this was made for, if known; it is checked.
    num_heads: the number of query heads per layer, likewise.
    num_kv_heads: the number of key and value heads per layer, likewise.
    min_seq_len: shorter prompts stay dense; None leaves it to the options.
    provenance: where the config comes from, as JSON values. It decides nothing and is not compared.

    Raises OptionValueError and UnknownPatternError.
    """

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

    def effective(self, number: int) -> LayerConfig:
        """What one layer uses, the config's own defaults filled in."""
        own = self.layer(number)
        length = self.min_seq_len if own.min_seq_len is None else own.min_seq_len
        default = own.default or self.default
        return LayerConfig(default, own.heads, own.num_heads, length, grid=own.grid)

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
        total_heads: int | None = None,
    ) -> None:
        """Raise ConfigMismatchError if an attention of that layer and heads is of another model.

        num_heads, num_kv_heads: those of the attention, which may own a slice of the layer's.
        head_offset: the first head of the slice; None for all heads.
        total_heads: how many query heads the layer has, where a slice knows it.
        """
        if self.num_layers is not None and layer >= self.num_layers:
            raise ConfigMismatchError(
                f"the model has a layer {layer}, the config is for {self.num_layers} layers; "
                "use a config made for this model"
            )
        where = f"layer {layer}" if layer >= 0 else "an attention of unknown layer"
        for own in (LayerConfig(num_heads=self.num_heads), self.layer(layer)):
            own.check_heads(num_heads, head_offset, where, total_heads)
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
        return cls.from_fields(load_config(Path(path)), path)

    def save(self, path: str | Path) -> None:
        """Write our own JSON; a reader sees the old file or the new one, never a part."""
        save_config(self, Path(path))

    @classmethod
    def from_json(cls, text: str) -> SparseConfig:
        """The config that a JSON text in any of the formats of `load` describes."""
        return cls.from_fields(parse_config(text, "<text>"), "<text>")

    @classmethod
    def from_fields(cls, fields: ConfigFields, source: str | Path) -> SparseConfig:
        """The config of what a file holds. Raises ConfigFileError if that makes no config."""
        values = {item.name: getattr(fields, item.name) for item in dataclasses.fields(fields)}
        try:
            return cls(**values)
        except MpassError as error:
            raise ConfigFileError(source, [("$", str(error))]) from error

    def to_json(self) -> str:
        """Our own format, one layer a line."""
        return config_to_json(self)

    def to_minference(self) -> str:
        """MInference's per-head JSON. Raises ConfigFileError for what that format cannot say."""
        return config_to_minference(self)


def first(entry: tuple[Span, LayerConfig]) -> int:
    """Where a span starts: the order of `SparseConfig.layers`."""
    return entry[0].first


def builtin_default(
    device: str = "cpu",
    window: int = 0,
    *,
    causal: bool = True,
    max_loss: float | None = None,
) -> Pattern:
    """The pattern of a head that nothing configures, or only what the model may lose.

    device: type of the device; window: sliding window of the attention in tokens, 0 for none.
    causal: whether no query sees later keys. Attention that sees both ways is diffuse: on the
        encoder that was measured no pattern kept enough (docs/systems.md), so that it is dense.
    max_loss: nats per token, None where nothing is said of it.
    """
    if 0 < window <= EXACT_WINDOW or not causal:
        return find_pattern("dense")()
    if max_loss is not None:
        return pattern_for_loss(max_loss)
    return find_pattern(device_lowering(device).default_pattern)()
