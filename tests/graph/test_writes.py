"""Writes in place: what a graph may drop after a rewrite, and what it must keep."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mpass.graph.dead_code import remove_dead
from mpass.graph.writes import StorageWrites


def capture(function, *args) -> fx.GraphModule:
    graphs = []

    def backend(gm, _inputs):
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend)(*args)
    return graphs[0]


def names(gm: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in gm.graph.nodes if node.op == "call_method"}


def test_update_of_a_cache_that_is_read_later_is_kept():
    def update(new: Tensor) -> Tensor:
        cache = torch.zeros(8, 4)
        cache.index_copy_(0, torch.arange(3), new)
        return cache * 2

    gm = capture(update, torch.ones(3, 4))
    remove_dead(gm.graph)
    assert "index_copy_" in names(gm)


def test_update_of_an_input_is_kept():
    def update(cache: Tensor, new: Tensor) -> Tensor:
        cache[:3].add_(new)
        return new + 1

    gm = capture(update, torch.ones(8, 4), torch.ones(3, 4))
    remove_dead(gm.graph)
    assert "add_" in names(gm)


def test_mask_that_is_built_in_place_goes_when_nothing_reads_it():
    def attention(x: Tensor) -> Tensor:
        mask = torch.zeros(8, 8)
        mask.masked_fill_(torch.ones(8, 8, dtype=torch.bool).triu_(1), -1e9)
        return x + mask

    gm = capture(attention, torch.ones(8, 8))
    (add,) = (node for node in gm.graph.nodes if "add" in str(node.target))
    add.replace_all_uses_with(next(iter(gm.graph.nodes)))
    remove_dead(gm.graph)
    assert {node.op for node in gm.graph.nodes} == {"placeholder", "output"}


def test_writes_through_views_are_seen():
    def update(x: Tensor) -> Tensor:
        y = x.clone()
        y.view(-1)[2:5].zero_()
        return y

    gm = capture(update, torch.ones(4, 4))
    writes = StorageWrites(gm.graph)
    (clone,) = (node for node in gm.graph.nodes if node.target == "clone")
    assert writes.ever_written(clone)
    assert not writes.ever_written(next(iter(gm.graph.nodes)))
