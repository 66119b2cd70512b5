"""Patterns by layer, where hooks wrap the layers' forward: followed, or refused before it runs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn import functional as F

import mpass
from mpass.errors import UnknownLayerError
from tests.helpers.toys import OPTIONS, Attention

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Block(nn.Module):
    """A block whose attention knows its layer, as models of transformers do."""

    def __init__(self, number: int | None):
        super().__init__()
        self.attention = Attention()
        if number is not None:
            self.attention.layer_idx = number

    def forward(self, x):
        return x + self.attention(x)


class Blocks(nn.Module):
    def __init__(self, depth: int, numbered: bool = True):
        super().__init__()
        self.layers = nn.ModuleList(Block(i if numbered else None) for i in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return x


@torch.compiler.disable
def move(args: Any) -> Any:
    """What a hook does between layers; Dynamo breaks the graph there."""
    return args


def as_accelerate(module: nn.Module) -> None:
    """Wrap a forward as accelerate.hooks.add_hook_to_module does."""
    module._old_forward = module.forward

    def new_forward(module, *args, **kwargs):
        return move(module._old_forward(*move(args), **move(kwargs)))

    hooked = functools.partial(new_forward, module)
    module.forward = functools.update_wrapper(hooked, module._old_forward)


def as_closure(module: nn.Module) -> None:
    old = module.forward

    @functools.wraps(old)
    def new_forward(*args, **kwargs):
        return move(old(*move(args), **kwargs))

    module.forward = new_forward


def run_blocks(model: nn.Module, config: mpass.SparseConfig) -> list[mpass.report.SiteReport]:
    """Compile a model, run it, and give the sites of all its graphs."""
    before = len(mpass.reports())
    model.compile(backend="minference", options=OPTIONS | {"config": config})
    with torch.no_grad():
        model(torch.randn(1, 300, 32))
    return [site for report in mpass.reports()[before:] for site in report.sites]


@pytest.mark.parametrize("hook", [as_accelerate, as_closure], ids=lambda hook: hook.__name__)
@pytest.mark.parametrize("part", ["block", "attention"])
def test_a_config_by_layer_is_applied_behind_hooks(hook: Callable[..., None], part: str):
    model = Blocks(3).eval()
    for block in model.layers:
        hook(block if part == "block" else block.attention)
    config = mpass.SparseConfig("a_shape", layers={0: "block_sparse", 1: "dense"})
    sites = run_blocks(model, config)
    assert [site.layer for site in sites] == [0, 1, 2]
    assert [site.status for site in sites] == ["sparse", "dense", "sparse"]
    assert [site.patterns[:1] for site in sites] == [
        ("block_sparse(100, 64)",),
        (),
        ("a_shape(128, 1024)",),
    ]
    assert not any("_old_forward" in site.path or "__self__" in site.path for site in sites)


def test_a_config_by_layer_is_refused_where_no_layer_is_known():
    model = Blocks(2, numbered=False).eval()
    for block in model.layers:
        as_accelerate(block)
    with pytest.raises(BackendCompilerFailed, match=r"(?s)UnknownLayerError.*options\['config'\]"):
        run_blocks(model, mpass.SparseConfig("a_shape", layers={1: "dense"}))


def test_a_decorator_by_layer_is_refused_where_no_layer_is_known():
    @mpass.configure(pattern="dense", layers="1-")
    def attend(x):
        return F.scaled_dot_product_attention(x, x, x, is_causal=True)

    compiled = torch.compile(attend, backend="minference", options=OPTIONS)
    with pytest.raises(BackendCompilerFailed, match=r"(?s)UnknownLayerError.*configure on.*attend"):
        compiled(torch.randn(1, 2, 300, 16))


def test_a_config_for_all_layers_alike_needs_no_layer():
    model = Blocks(2, numbered=False).eval()
    for block in model.layers:
        as_accelerate(block)
    sites = run_blocks(model, mpass.SparseConfig("a_shape", num_layers=2))
    assert {site.patterns[:1] for site in sites} == {("a_shape(128, 1024)",)}


def test_a_bidirectional_attention_without_a_layer_stays_dense():
    """A vision tower beside the language model that the config is for."""

    def attend(x):
        return F.scaled_dot_product_attention(x, x, x)

    options = OPTIONS | {"config": mpass.SparseConfig("a_shape", layers={1: "dense"})}
    torch.compile(attend, backend="minference", options=options)(torch.randn(1, 2, 300, 16))
    (site,) = mpass.last_report().sites
    assert site.status == "dense"
    assert "not causal, and" in site.reason


def test_the_message_says_what_to_do():
    text = str(UnknownLayerError("", "options['config']"))
    assert "Compile the whole model" in text
    assert "layer_idx" in text
