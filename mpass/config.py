"""SparseConfig: which pattern, with which parameters, each head of each layer uses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mpass.errors import ConfigMismatchError, OptionValueError
from mpass.patterns.base import Pattern, find_pattern

HeadPatterns = tuple[Pattern, ...]

DEFAULT_PATTERN = "vertical_slash"
"""What a site gets that nothing else configures."""


@dataclass(frozen=True)
class SparseConfig:
    """A pattern per layer and head, and a default for what is not named.

    default: pattern of every layer that `layers` does not name; None for the built-in default.
    layers: per layer index, one pattern for all heads or one per query head. Any mapping is
    taken; it is kept as a sorted tuple, so that the config is hashable and part of compile keys.
    num_layers: layers of the model this was made for, if known.
    min_seq_len: shorter prompts stay dense; None leaves it to the options.
    """

    default: Pattern | None = None
    layers: tuple[tuple[int, HeadPatterns], ...] = ()
    num_layers: int | None = None
    min_seq_len: int | None = None

    def __init__(
        self,
        default: Pattern | str | None = None,
        layers: Mapping[int, Pattern | str | Sequence[Pattern | str]]
        | Sequence[tuple[int, HeadPatterns]] = (),
        *,
        num_layers: int | None = None,
        min_seq_len: int | None = None,
    ) -> None:
        entries = layers.items() if isinstance(layers, Mapping) else layers
        normal: dict[int, HeadPatterns] = {}
        for layer, heads in entries:
            if not isinstance(layer, int) or isinstance(layer, bool) or layer < 0:
                raise OptionValueError("config.layers", layer, "layer indexes from 0")
            if layer in normal:
                raise OptionValueError("config.layers", layer, "every layer once")
            items = [heads] if isinstance(heads, Pattern | str) else list(heads)
            if not items:
                raise OptionValueError(f"config.layers[{layer}]", heads, "at least one pattern")
            normal[layer] = tuple(as_pattern(item) for item in items)
        object.__setattr__(self, "default", None if default is None else as_pattern(default))
        object.__setattr__(self, "layers", tuple(sorted(normal.items(), key=lambda x: x[0])))
        object.__setattr__(self, "num_layers", num_layers)
        object.__setattr__(self, "min_seq_len", min_seq_len)

    def patterns(self, layer: int, num_heads: int) -> HeadPatterns:
        """The pattern of each query head of a layer; layer -1 (unknown) gets the default.

        Raises ConfigMismatchError if the layer's list is not as long as the model has heads, or
        if the model has a layer beyond `num_layers`.
        """
        if self.num_layers is not None and layer >= self.num_layers:
            raise ConfigMismatchError(
                f"the model has a layer {layer}, the config is for {self.num_layers} layers; "
                "use a config made for this model"
            )
        heads = dict(self.layers).get(layer)
        if heads is None:
            default = self.default or find_pattern(DEFAULT_PATTERN)()
            return (default,) * num_heads
        if len(heads) == 1:
            return heads * num_heads
        if len(heads) != num_heads:
            raise ConfigMismatchError(
                f"layer {layer} has {num_heads} query heads, the config names {len(heads)}; "
                "use a config made for this model"
            )
        return heads


def as_pattern(value: object) -> Pattern:
    """A pattern object from one, or from its name with default parameters."""
    if isinstance(value, Pattern):
        return value
    if isinstance(value, str):
        return find_pattern(value)()
    raise OptionValueError("pattern", value, "a pattern object or the name of one")
