"""New nodes that give an attention its tokens in the order of tiles, and its output back."""

from __future__ import annotations

import dataclasses
import operator

import torch
from torch import fx

from mpass.errors import GridError
from mpass.graph.new_nodes import copy_meta, propagate
from mpass.graph.nodes import example, number_now, shape_of
from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.graph.sizes import agree, is_unbacked
from mpass.lowering import tiles as tile_ops  # (defines minference::tile_order)
from mpass.lowering.tiles import Grid

aten = torch.ops.aten


def grid_of(site: AttentionSite, grid: Grid | None, source: str) -> Grid | None:
    """The grid in whose tiles a sparse attention sees its tokens; None for their own order.

    Attention to itself is meant that sees both ways: what is causal, has a window or looks at other
    tokens is left as it is, and so is what is read at run time. The grid is one in numbers where
    the length is known, and what was said where each call has its own.

    grid: how the tokens lie; source: which place says so, for the error. Raises GridError where the
    tokens do not fill the grid, and where a decorator or a layer's config gives one to causal
    attention.
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
    """What an attention in the order of tiles reads, and the node with the place of each token."""

    site: AttentionSite
    key: fx.Node
    value: fx.Node
    key_mask: fx.Node | None
    places: fx.Node


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
    """Query, key, value and key mask of a site in the order of tiles.

    shared: whether the order that an earlier site has is taken, if it is the same. Sites that a
    checkpoint may compute again have their own.
    """
    numbers = grid.arguments()
    target = tile_ops.tile_order
    known = graph.find_nodes(op="call_function", target=target) if shared else []
    device = example(site.query).device
    same = (n for n in known if n.args[1:] == numbers and example(n.args[0]).device == device)
    made = next(same, None)
    if made is None:
        made = graph.call_function(target, (site.query, *numbers))
        copy_meta(site.output, made)
        propagate(made, site.output)
    order, places = (graph.call_function(operator.getitem, (made, i)) for i in range(2))

    def moved(node: fx.Node, dim: int) -> fx.Node:
        propagate(node, site.output)
        return graph.call_function(aten.index_select.default, (node, dim, order))

    tokens = [moved(node, 2) for node in (site.query, key, value)]
    mask = None if key_mask is None else moved(key_mask, 1)
    for node in (order, places, *tokens, *([] if mask is None else [mask])):
        copy_meta(site.output, node)
        propagate(node, site.output)
    query, key, value = tokens
    return Tiled(dataclasses.replace(site, query=query), key, value, mask, places)


def insert_back(graph: fx.Graph, output: fx.Node, places: fx.Node) -> list[fx.Node]:
    """The output [B, H, Nq, Dv] in the tokens' own order, the last node; laid out as before."""
    rows = graph.call_function(aten.transpose.int, (output, 1, 2))
    rows_back = graph.call_function(aten.index_select.default, (rows, 1, places))
    return [rows, rows_back, graph.call_function(aten.transpose.int, (rows_back, 1, 2))]
