"""Layers of models whose forward is decorated: the compiled frame is the decorator's, without self.

transformers decorates forwards in this way where it renames an argument.
"""

from __future__ import annotations

import functools

import pytest
import torch

import mpass
from tests.helpers.toys import OPTIONS, Decoder

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

DEPTH = 3


def renaming(function):
    """As decorators do that rename an argument."""

    @functools.wraps(function)
    def wrapped(*args, **kwargs):
        return function(*args, **kwargs)

    return wrapped


def with_another_self(function):
    """Likewise, with a name of its own for the module."""

    @functools.wraps(function)
    def wrapped(module, *args, **kwargs):
        return function(module, *args, **kwargs)

    return wrapped


class Decorated(Decoder):
    forward = renaming(Decoder.forward)


class Twice(Decoder):
    forward = with_another_self(Decorated.forward)


class Model(torch.nn.Module):
    """A decorated forward on the outside and another one inside, in a place of its own."""

    def __init__(self):
        super().__init__()
        self.model = Decorated(depth=DEPTH).eval()

    @renaming
    def forward(self, x):
        return self.model(x)


@torch.no_grad()
def compiled_sites(model, **options):
    mpass.compile(model, **{**OPTIONS, **options})(torch.randn(1, 256, 32))
    return mpass.last_report().sites


@pytest.mark.parametrize(
    "cls, path", [(Decorated, "layers"), (Twice, "layers"), (Model, "model.layers")]
)
def test_each_layer_takes_its_own_patterns(cls, path):
    patterns = [mpass.AShape(64 * (1 + layer), 64) for layer in range(DEPTH)]
    torch.manual_seed(0)
    sites = compiled_sites(cls(), config=mpass.SparseConfig(layers=dict(enumerate(patterns))))
    assert [site.layer for site in sites] == list(range(DEPTH))
    assert [site.path for site in sites] == [f"{path}.{layer}" for layer in range(DEPTH)]
    for site, pattern in zip(sites, patterns, strict=True):
        assert set(site.patterns) == {str(pattern)}


def test_a_config_for_more_layers_is_refused():
    model = Model()
    model.compile(
        backend="minference",
        options={**OPTIONS, "config": mpass.SparseConfig(num_layers=DEPTH + 1)},
    )
    with torch.no_grad(), pytest.raises(Exception, match=f"{DEPTH + 1} layers"):
        model(torch.randn(1, 256, 32))


def test_a_config_beside_the_model_is_found(tmp_path):
    mpass.SparseConfig(mpass.AShape(128, 64)).save(tmp_path / "minference.json")
    model = Model()
    model.config = type("Config", (), {"_name_or_path": str(tmp_path)})()
    assert {name for site in compiled_sites(model) for name in site.patterns} == {
        "a_shape(128, 64)"
    }


def test_a_decorated_class_that_is_configured_is_heard():
    configured = mpass.configure(pattern=mpass.AShape(192, 64))(type("Own", (Decorated,), {}))
    sites = compiled_sites(configured(depth=1))
    assert set(sites[0].patterns) == {"a_shape(192, 64)"}


def test_a_layer_of_a_list_that_is_given_is_named_by_its_place():
    """The first tuple of a frame is not the module that is called, where it is a list of layers."""
    layers = tuple(Decoder(depth=1).layers[0].eval() for _ in range(3))

    def run(x, layers):
        return layers[2](x)

    def run_all(*layers):
        return layers[0](layers[1](torch.ones(1, 256, 32)))

    with torch.no_grad():
        torch.compile(run, backend="minference", options=OPTIONS)(torch.randn(1, 256, 32), layers)
        assert [site.layer for site in mpass.last_report().sites] == [2]
        torch.compile(run_all, backend="minference", options=OPTIONS)(*layers)
        assert [site.layer for site in mpass.last_report().sites] == [0, 1]
