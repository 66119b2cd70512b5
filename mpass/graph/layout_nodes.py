"""New nodes that give a result the dimensions and the layout of what it replaces."""

from __future__ import annotations

import torch
from torch import fx

from mpass.graph.lengths import as_argument
from mpass.graph.new_nodes import copy_meta, propagate
from mpass.graph.nodes import shape_of
from mpass.graph.site import AttentionSite

CONTIGUOUS = {"memory_format": torch.contiguous_format}

aten = torch.ops.aten


def insert_dimensions(graph: fx.Graph, site: AttentionSite, output: fx.Node) -> fx.Node:
    """A result [B, H, Nq, Dv] with the dimensions of the site's output."""
    if site.output_transposed:
        return graph.call_function(aten.transpose.int, (output, 1, 2))
    if not site.output_folded:
        return output
    *leading, _, _ = shape_of(site.output)
    if len(leading) == 1:
        return graph.call_function(aten.flatten.using_ints, (output, 0, 1))
    sizes = [as_argument(graph, size) for size in leading[:-1]]
    return graph.call_function(aten.unflatten.int, (output, 0, sizes))


def insert_layout(
    graph: fx.Graph, origin: fx.Node, output: fx.Node, order: tuple[int, ...]
) -> fx.Node:
    """A copy of the output whose dimensions lie in memory in an order."""
    back = tuple(order.index(dim) for dim in range(len(order)))
    with graph.inserting_before(origin):
        for target, arguments, settings in (
            (aten.permute.default, (list(order),), {}),
            (aten.clone.default, (), CONTIGUOUS),
            (aten.permute.default, (list(back),), {}),
        ):
            output = graph.call_function(target, (output, *arguments), dict(settings))
            copy_meta(origin, output)
            propagate(output, origin)
    return output
