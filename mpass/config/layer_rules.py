"""Configs that follow from a rule over layers instead of a search."""

from __future__ import annotations

from mpass.config.layer import LayerConfig, PatternLike, as_pattern
from mpass.config.spans import Span
from mpass.config.sparse_config import SparseConfig
from mpass.patterns.tri_shape import TriShape


def triangle_mix(
    shallow: PatternLike = "dense",
    *,
    first_deep_layer: int = 16,
    deep: PatternLike | None = None,
) -> SparseConfig:
    """TriangleMix (arXiv 2507.21526): `shallow` below `first_deep_layer`, tri-shape from it on.

    Deep layers of dense models were found to lose little when only first keys, a local window and
    the last queries are kept; which layer is the first is the model's matter (16 of 32 for
    Llama-3.1-8B). shallow: dense as published, or any pattern; deep: TriShape() by default.
    """
    layers = {Span(first_deep_layer, None): LayerConfig(default=as_pattern(deep or TriShape()))}
    if first_deep_layer > 0:
        layers[Span(0, first_deep_layer - 1)] = LayerConfig(default=as_pattern(shallow))
    return SparseConfig(layers=layers, provenance={"rule": "triangle_mix"})
