"""Finding every attention of a graph, whatever its spelling."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mpass.graph.nodes import layer_index, module_path
from mpass.graph.site import AttentionSite
from mpass.masks.prover import MaskProver
from mpass.match.inline import called_graph, inline_subgraphs, reason_to_keep
from mpass.match.spellings import SPELLINGS

__all__ = ["SPELLINGS", "find_attention", "inline_subgraphs"]


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """The attentions of a graph in the order of its nodes, those of its sub-graphs included.

    Nothing that is there is edited; small nodes that make a key mask may be added, which are dead
    until a rewrite uses them. Attention in a sub-graph that `inline_subgraphs` had to leave alone
    is dense.
    """
    prover = MaskProver(gm.graph)
    sites: list[AttentionSite] = []
    for node in list(gm.graph.nodes):
        for spelling in SPELLINGS:
            if spelling.starts_at(node) and (site := spelling.match(node, prover)) is not None:
                sites.append(replace(site, spelling=spelling.name))
        inner = called_graph(node)
        if inner is not None:
            reason = reason_to_keep(node, prover.writes) or "inside of a sub-graph"
            sites += [dense_inside(site, node, reason) for site in find_attention(inner)]
    return sites


def dense_inside(site: AttentionSite, call: fx.Node, reason: str) -> AttentionSite:
    """A site of a sub-graph, named after its call, that stays dense."""
    path = module_path(call) or site.path
    reason = site.dense_reason or reason
    return replace(site, path=path, layer=layer_index(path), dense_reason=reason)
