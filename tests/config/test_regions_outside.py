"""Regions and layers that are named and have no effect are told."""

from __future__ import annotations

import warnings

import pytest
import torch

import mpass
from mpass.config.decorators import ConfigureWarning
from tests.helpers.toys import Decoder, compile_toy

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

X = torch.randn(1, 300, 32)


@torch.no_grad()
def test_a_region_around_a_compiled_call_is_warned_of_once_where_it_is_entered():
    model = compile_toy(Decoder(depth=2).eval(), {})
    with (
        pytest.warns(ConfigureWarning, match=r"test_regions_outside.py:\d+ has no effect") as seen,
        mpass.configure(pattern="a_shape"),
    ):
        model(X)  # compiles
        model(X)
    assert [each.category for each in seen].count(ConfigureWarning) == 1
    region = mpass.configure(pattern="a_shape")
    with pytest.warns(ConfigureWarning, match="Move it into the code"), region, region:
        model(X)  # runs what was compiled before
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(X)


@torch.no_grad()
def test_a_region_inside_of_compiled_or_of_eager_code_is_not_warned_of():
    inner = Decoder(depth=1).eval()

    def program(x):
        with mpass.configure(pattern=mpass.AShape(1, 9)):
            return inner(x)

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConfigureWarning)
        program(X)
        compile_toy(program, {})(X)
    assert {site.patterns for site in mpass.last_report().sites} == {("a_shape(1, 9)",) * 4}


@torch.no_grad()
@pytest.mark.parametrize(("layers", "told"), [("99", "99"), ("2-", "2-"), ("0-7", "")])
def test_layers_that_the_model_does_not_have_are_told(layers, told):
    config = mpass.SparseConfig(layers={layers: "a_shape(1, 9)"})
    compile_toy(Decoder(depth=2).eval(), {"config": config})(X)
    notes = [note for note in mpass.last_report().notes if "has no effect" in note]
    assert notes == [
        f"options['config'] names layer {told}, and the last attention that was compiled is of "
        "layer 1: what it says of them has no effect"
    ] * bool(told)
