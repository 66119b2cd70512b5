"""Writes in place: what a graph may drop after a rewrite, and what it must keep."""

from __future__ import annotations

import operator

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx

from mpass.graph.dead_code import remove_dead
from mpass.graph.observation import observe
from mpass.graph.writes import StorageWrites, written_by


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
    remove_dead(gm.graph, [add])
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


WRITES = {
    "activation with inplace": lambda x, y: F.leaky_relu(x, 0.1, True),
    "inplace by keyword": lambda x, y: F.selu(x, inplace=True),
    "input by keyword": lambda x, y: F.relu(input=x, inplace=True),
    "hardswish": lambda x, y: torch.nn.Hardswish(True)(x),
    "list": lambda x, y: torch._foreach_copy_([x], [y]),
    "out": lambda x, y: torch.add(y, y, out=x),
    "outs": lambda x, y: torch.aminmax(y, out=(x.new_empty(()), x[0, 0])),
    "item": lambda x, y: x.__setitem__(0, 1.0),
    "view": lambda x, y: x.view(-1)[2:].zero_(),
    "packet": lambda x, y: torch.ops.aten.add_(x, 1),
    "augmented": lambda x, y: operator.iadd(x, 1),
}


@pytest.mark.parametrize("name", WRITES)
def test_writes_are_seen_however_they_are_spelled(name):
    def function(x: Tensor, y: Tensor) -> Tensor:
        x, y = x + 0, y + 0
        WRITES[name](x, y)
        return x + y

    gm = capture(function, torch.ones(4, 4), torch.ones(4, 4))
    first, second = [node for node in gm.graph.nodes if node.name in ("x", "y")]
    writes = StorageWrites(gm.graph)
    assert writes.ever_written(first)
    assert not writes.ever_written(second)


READS = {
    "activation": lambda x, y: F.leaky_relu(x, 0.1),
    "dunder": lambda x, y: x.__add__(y),
    "item": lambda x, y: x[0, 0] + y.sum().clamp(0),
    "batch of ops": lambda x, y: torch.where(x > 0, input=x, other=y).softmax(-1).to(torch.half),
    "requires_grad_": lambda x, y: x.requires_grad_(False),
}


@pytest.mark.parametrize("name", READS)
def test_what_only_reads_is_known_to(name):
    gm = capture(lambda x, y: READS[name](x + 0, y + 0) * 1, torch.ones(4, 4), torch.ones(4, 4))
    calls = [node for node in gm.graph.nodes if node.op.startswith("call")]
    assert all(observe(node).known for node in calls)
    assert not any(written_by(node) for node in calls)


def test_unknown_function_writes_to_all_its_tensors():
    @torch._dynamo.allow_in_graph
    def secret(x: Tensor, y: Tensor) -> Tensor:
        return x + y

    gm = capture(lambda x, y: secret(x + 0, y + 0), torch.ones(4), torch.ones(4))
    (call,) = (node for node in gm.graph.nodes if "secret" in str(node.target))
    assert written_by(call) == call.all_input_nodes


def test_observing_does_not_touch_sizes_or_values_of_the_graph():
    def function(x: Tensor) -> Tensor:
        mask = torch.ones(x.shape[0], x.shape[0])
        mask.unsqueeze_(0)
        return mask + x

    graphs = []

    def backend(gm, _inputs):
        before = [str(node.meta.get("example_value")) for node in gm.graph.nodes]
        env = gm.graph.find_nodes(op="placeholder")[0].meta["example_value"].node.shape_env
        guards = len(env.guards)
        writes = StorageWrites(gm.graph)
        assert [str(node.meta.get("example_value")) for node in gm.graph.nodes] == before
        assert len(env.guards) == guards
        (mask,) = (node for node in gm.graph.nodes if node.name == "mask")
        graphs.append(writes.reshaped(mask))
        return gm

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=True)(torch.ones(6, 6))
    assert graphs[0] is not None


def test_what_was_dead_before_and_random_numbers_stay():
    def function(x: Tensor) -> Tensor:
        torch.rand(3)
        kept = F.dropout(x, 0.5)
        return x + kept

    gm = capture(function, torch.ones(8, 8))
    (add,) = (node for node in gm.graph.nodes if "add" in str(node.target))
    add.replace_all_uses_with(next(iter(gm.graph.nodes)))
    remove_dead(gm.graph, [add])
    text = str(gm.graph)
    assert "dropout" in text and "rand" in text and "add" not in text


def test_write_through_a_view_of_what_was_replaced_is_kept():
    def function(x: Tensor) -> Tensor:
        out = x * 2
        out[:, 0].zero_()
        return out + 1

    gm = capture(function, torch.ones(8, 8))
    (mul,) = (node for node in gm.graph.nodes if "mul" in str(node.target))
    with gm.graph.inserting_before(mul):
        new = gm.graph.call_function(torch.mul, (mul.args[0], 3))
    mul.replace_all_uses_with(new)
    remove_dead(gm.graph, [mul])
    assert "zero_" in names(gm)
    gm.recompile()
    assert gm(torch.ones(8, 8))[0][0, 0] == 1
