"""Finding every attention of a graph, whatever its spelling."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from mpass.graph.nodes import layer_index, module_path
from mpass.graph.site import AttentionSite
from mpass.masks.prover import MaskProver
from mpass.match.eager import match_eager
from mpass.match.flex_attention import match_flex
from mpass.match.inline import called_graph, inline_subgraphs, reason_to_keep
from mpass.match.minference_op import match_marked
from mpass.match.multi_head_attention import match_mha
from mpass.match.sdpa import match_sdpa

__all__ = ["find_attention", "inline_subgraphs"]

MATCHERS = (match_sdpa, match_eager, match_flex, match_mha, match_marked)
"""One per spelling: (node, prover) -> the site around the node, or None."""


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """The attentions of a graph in the order of its nodes, those of its sub-graphs included.

    Nothing that is there is edited; small nodes that make a key mask may be added, which are dead
    until a rewrite uses them. Attention in a sub-graph that `inline_subgraphs` had to leave alone
    is dense.
    """
    prover = MaskProver(gm.graph)
    sites: list[AttentionSite] = []
    for node in list(gm.graph.nodes):
        sites += [site for match in MATCHERS if (site := match(node, prover)) is not None]
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
