"""Fake values of new nodes are shared by equal calls only, and name no two tensors one."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

import mpass.lowering.ops  # noqa: F401  (defines the ops)
from mpass.graph.new_nodes import Known, is_record, propagate
from mpass.graph.nodes import value_of

ATTENTION = torch.ops.minference.attention.default


@dataclasses.dataclass
class Graph:
    """A graph of one fake [B, H, N, D] input per size, and what was propagated in it."""

    graph: fx.Graph
    mode: FakeTensorMode
    known: Known

    def tensor(self, *shape: int, dtype: torch.dtype = torch.float32) -> fx.Node:
        node = self.graph.placeholder(f"x{len(self.graph.nodes)}")
        with self.mode:
            node.meta["example_value"] = torch.empty(*shape, dtype=dtype)
        return node

    def value(self, origin: fx.Node, target: object, *args: object) -> torch.Tensor:
        node = self.graph.call_function(target, args)
        propagate(node, origin, self.known)
        return value_of(node)


@pytest.fixture
def graph() -> Graph:
    return Graph(fx.Graph(), FakeTensorMode(), {})


def attend(graph: Graph, x: fx.Node, y: fx.Node) -> torch.Tensor:
    return graph.value(x, ATTENTION, x, y, y, None, None, 0, 0, True, 1.0, 0.0)


def test_equal_calls_share_a_value_and_others_do_not(graph):
    first, same = graph.tensor(1, 2, 8, 4), graph.tensor(1, 2, 8, 4)
    shared = attend(graph, first, first)
    assert attend(graph, same, same) is shared
    assert len(graph.known) == 1

    longer, half = graph.tensor(1, 2, 9, 4), graph.tensor(1, 2, 8, 4, dtype=torch.bfloat16)
    assert attend(graph, longer, longer).shape == (1, 2, 9, 4)
    assert attend(graph, half, half).dtype == torch.bfloat16
    assert len(graph.known) == 3


def test_only_the_number_of_a_layer_is_left_out():
    """A field of a pattern may be called layer as well: that is a list."""
    assert is_record("layer", 3) and is_record("site", 12345)
    assert not is_record("layer", [3]) and not is_record("window", 3)


def test_a_view_is_never_shared(graph):
    first, same = graph.tensor(1, 2, 8, 4), graph.tensor(1, 2, 8, 4)
    views = [graph.value(x, torch.ops.aten.transpose.int, x, 1, 2) for x in (first, same)]
    assert [v.untyped_storage()._cdata for v in views] == [
        value_of(x).untyped_storage()._cdata for x in (first, same)
    ]
    assert not graph.known


@pytest.mark.parametrize("op", ["sparse_attention", "attention", "read_mask", "join_indexes"])
def test_ops_whose_values_are_shared_give_new_memory(op):
    schema = getattr(torch.ops.minference, op).default._schema
    assert all(part.alias_info is None for part in (*schema.arguments, *schema.returns))
