"""Finding every attention of a graph, whatever its spelling."""

from __future__ import annotations

from torch import fx

from mpass.match.sdpa import match_sdpa
from mpass.site import AttentionSite

__all__ = ["find_attention"]


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """The attentions of a graph in the order of their outputs. Nothing is edited."""
    return [site for node in gm.graph.nodes if (site := match_sdpa(node)) is not None]
