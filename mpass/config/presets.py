"""Presets: names for whole configs, `options={"pattern": "minference"}`."""

from __future__ import annotations

from dataclasses import dataclass

from mpass.config.sparse_config import SparseConfig
from mpass.patterns.vertical_slash import VerticalSlash


@dataclass(frozen=True)
class Preset:
    """A named config; with `options["config"]` beside it, it serves the heads left open there."""

    name: str
    config: SparseConfig
    description: str


PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "auto",
            SparseConfig(),
            "the config shipped with the model if there is one, else the built-in default",
        ),
        Preset(
            "minference",
            SparseConfig(VerticalSlash(1000, 6096)),
            "MInference's: the per-head file given as config, 1000 columns and 6096 diagonals else",
        ),
    )
}
"""All presets by name. A pattern of the same name would be hidden: there is none."""


def with_preset(preset: Preset, config: SparseConfig | None) -> SparseConfig:
    """`config` with what it leaves open taken from the preset."""
    if config is None:
        return preset.config
    return config.with_default(preset.config.default)
