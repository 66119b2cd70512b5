"""Finding every attention of a graph, whatever its spelling."""

from __future__ import annotations

from torch import fx

from mpass.mask import MaskProver
from mpass.match.eager import match_eager
from mpass.match.marked import match_marked
from mpass.match.sdpa import match_sdpa
from mpass.site import AttentionSite

__all__ = ["find_attention"]

MATCHERS = (match_sdpa, match_eager, match_marked)
"""One per spelling: (node, prover) -> the site around the node, or None."""


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """The attentions of a graph in the order of their outputs.

    Nothing that is there is edited; small nodes that make a key mask may be added, which are dead
    until a rewrite uses them.
    """
    prover = MaskProver(gm.graph)
    sites = (matcher(node, prover) for node in list(gm.graph.nodes) for matcher in MATCHERS)
    return [site for site in sites if site is not None]
