"""Configs by layer rule."""

from __future__ import annotations

import mpass
from mpass.config.layer_rules import triangle_mix
from mpass.patterns.tri_shape import TriShape
from mpass.patterns.union import Union


def test_triangle_mix_is_dense_below_and_tri_shape_from_the_first_deep_layer_on():
    config = triangle_mix(first_deep_layer=3)
    patterns = [config.patterns(layer, 2) for layer in range(6)]
    assert patterns == [(mpass.Dense(),) * 2] * 3 + [(TriShape(),) * 2] * 3


def test_triangle_mix_takes_other_patterns_and_survives_its_file():
    config = triangle_mix(Union(0.9), first_deep_layer=1, deep=TriShape(4, 256, 64))
    assert config.patterns(0, 1) == (Union(0.9),)
    assert config.patterns(7, 1) == (TriShape(4, 256, 64),)
    assert mpass.SparseConfig.from_json(config.to_json()) == config
