"""New nodes that give an attention its tokens in the order of tiles, and its output back."""

from __future__ import annotations

import dataclasses
import functools
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mpass.errors import GridError
from mpass.graph.new_nodes import copy_meta, propagate
from mpass.graph.nodes import example, number_now, shape_of
from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.graph.sizes import agree, is_unbacked
from mpass.lowering import similar_order as order_ops  # (defines minference::similar_order)
from mpass.lowering import tiles as tile_ops  # (defines minference::tile_order)
from mpass.lowering.tiles import Grid

aten = torch.ops.aten


def grid_of(site: AttentionSite, grid: Grid | None, source: str, denoising: bool) -> Grid | None:
    """The grid in whose tiles a sparse attention sees its tokens; None for their own order.

    Attention to itself is meant that sees both ways: what is causal, has a window or looks at other
    tokens is left as it is, and so is what is read at run time. The grid is one in numbers where
    the length is known, and what was said where each call has its own.

    grid: how the tokens lie; source: which place says so, for the error; denoising: whether
    something is kept over steps, whose order then may not depend on what tokens hold. Raises
    GridError where the tokens do not fill the grid, and where a decorator or a layer's config gives
    one to causal attention.
    """
    if grid is None:
        return None
    where = f"layer {site.layer}" if site.layer >= 0 else "an attention"
    where += f" at {site.path}" if site.path else ""
    mask = site.mask
    if mask is not None and (mask.causal or mask.window) and source != OPTION:
        kind = "is causal" if mask.causal else "has a window"
        raise GridError(
            f"{where} {kind}: the order of its tokens counts, and {source} gives it a grid; "
            "give it to attention that sees both ways"
        )
    if mask is None or not is_over_a_grid(site, mask):
        return None
    if grid.by_content:
        # A key mask is one for all heads, and only CPUs sort without a wait of the host.
        served = mask.key_mask is None and example(site.query).device.type == "cpu"
        return grid if served and not denoising else None
    length = shape_of(site.query)[2]
    found = grid.fit(number_now(length), where)
    return found if isinstance(length, int) else grid


OPTION = "options['grid']"
"""The source of a grid that is meant for the attentions that it fits."""


def is_over_a_grid(site: AttentionSite, mask: MaskMeaning) -> bool:
    """Whether a site may be seen in another order: all tokens look at the same ones, both ways.

    A bias by distance is one of the tokens' own order.
    """
    length, keys = shape_of(site.query)[2], shape_of(site.key)[2]
    plain = site.is_two_sided and mask.valid_keys is None and site.listed is None
    if not plain or site.kept is not None or site.ahead is not None:
        return False
    if site.distance_bias is not None:
        return False
    if is_unbacked(length) or not agree(length, keys):
        return False
    return mask.key_mask is None or agree(shape_of(mask.key_mask)[1], keys)


@dataclasses.dataclass(frozen=True)
class Tiled:
    """What an attention in another order reads, and what brings its output [B, H, N, Dv] back."""

    site: AttentionSite
    key: fx.Node
    value: fx.Node
    key_mask: fx.Node | None
    back: Callable[[fx.Node], list[fx.Node]]


def insert_tiles(
    graph: fx.Graph,
    site: AttentionSite,
    key: fx.Node,
    value: fx.Node,
    key_mask: fx.Node | None,
    grid: Grid,
    *,
    shared: bool,
) -> Tiled:
    """Query, key, value and key mask of a site in the order of tiles, or of their content.

    shared: whether the order that an earlier site has is taken, if it is the same. Sites that a
    checkpoint may compute again have their own.
    """
    insert = functools.partial(insert_node, graph, site.output)
    if grid.by_content:
        return insert_by_content(graph, site, key, value)
    numbers = grid.arguments()
    target = tile_ops.tile_order
    known = graph.find_nodes(op="call_function", target=target) if shared else []
    device = example(site.query).device
    same = (n for n in known if n.args[1:] == numbers and example(n.args[0]).device == device)
    made = next(same, None) or insert(target, site.query, *numbers)
    order, places = (insert(operator.getitem, made, i) for i in range(2))
    query, key, value = (
        insert(aten.index_select.default, node, 2, order) for node in (site.query, key, value)
    )
    if key_mask is not None:
        propagate(key_mask, site.output)
        key_mask = insert(aten.index_select.default, key_mask, 1, order)

    def back(output: fx.Node) -> list[fx.Node]:
        rows = graph.call_function(aten.transpose.int, (output, 1, 2))
        rows_back = graph.call_function(aten.index_select.default, (rows, 1, places))
        return [rows, rows_back, graph.call_function(aten.transpose.int, (rows_back, 1, 2))]

    return Tiled(dataclasses.replace(site, query=query), key, value, key_mask, back)


def insert_by_content(graph: fx.Graph, site: AttentionSite, key: fx.Node, value: fx.Node) -> Tiled:
    """Query, key and value of a site with tokens together that are alike, per head."""
    insert = functools.partial(insert_node, graph, site.output)
    made = insert(order_ops.similar_order, site.query, key)
    queries, keys, places = (insert(operator.getitem, made, i) for i in range(3))

    def moved(tokens: fx.Node, rows: fx.Node) -> fx.Node:
        flat = insert(aten.flatten.using_ints, tokens, 0, 2)
        return insert(
            aten.view_as.default, insert(aten.index_select.default, flat, 0, rows), tokens
        )

    def back(output: fx.Node) -> list[fx.Node]:
        flat = graph.call_function(aten.flatten.using_ints, (output, 0, 2))
        rows = graph.call_function(aten.index_select.default, (flat, 0, places))
        return [flat, rows, graph.call_function(aten.view_as.default, (rows, output))]

    query, key, value = moved(site.query, queries), moved(key, keys), moved(value, keys)
    return Tiled(dataclasses.replace(site, query=query), key, value, None, back)


def insert_node(graph: fx.Graph, origin: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """A call with its fake value."""
    for argument in arguments:
        if isinstance(argument, fx.Node):
            propagate(argument, origin)
    node = graph.call_function(target, arguments)
    copy_meta(origin, node)
    propagate(node, origin)
    return node
