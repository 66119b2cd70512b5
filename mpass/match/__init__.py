"""Finding every attention of a graph, whatever its spelling."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from torch import fx

from mpass.failures import contain
from mpass.graph.arguments import tensor_arguments
from mpass.graph.nodes import layer_index, module_path, op_name, shape_of
from mpass.graph.printing import count_ops
from mpass.graph.site import AttentionSite
from mpass.masks.prover import MaskProver
from mpass.match.common import make_site
from mpass.match.eager_scores import trace_scores
from mpass.match.inline import called_graph, inline_subgraphs, reason_to_keep
from mpass.match.multi_head_attention import (
    NOT_OPENED,
    OpenedCall,
    as_spelled,
    open_calls,
    settle_calls,
)
from mpass.match.spellings import SPELLINGS
from mpass.match.unserved import find_unserved

__all__ = [
    "SPELLINGS",
    "OpenedCall",
    "erase_added",
    "find_attention",
    "inline_subgraphs",
    "open_calls",
    "settle_calls",
]

NESTING = "increment_nesting", "decrement_nesting"
"""Ends of the names of the ops between which a transform of torch.func is at work."""


def find_attention(gm: fx.GraphModule) -> list[AttentionSite]:
    """The attentions of a graph in the order of its nodes, those of its sub-graphs included.

    Nothing that is there is edited; small nodes that make a key mask may be added, which are dead
    until a rewrite uses them. Attention in a sub-graph that `inline_subgraphs` had to leave alone
    is dense, and so is attention at which matching fails.
    """
    prover = MaskProver(gm.graph)
    sites: list[tuple[int, AttentionSite]] = []
    starts: set[fx.Node] = set()
    depth = 0
    places = {node: place for place, node in enumerate(gm.graph.nodes)}
    for node, place in places.items():
        depth += nesting(node)
        for spelling in SPELLINGS:
            if not spelling.starts_at(node):
                continue
            before = set(gm.graph.nodes)
            try:
                site = transformed(node, prover) if depth else spelling.match(node, prover)
            except Exception as error:
                reason = contain(error, f"matching attention ({spelling.name})", count_ops(gm))
                site = site_at(node, reason)
                erase_added(gm.graph, before)
                prover = MaskProver(gm.graph)
            if site is not None:
                starts.add(node)
                sites.append((place, as_spelled(site, spelling.name)))
        inner = called_graph(node)
        if inner is not None:
            reason = reason_to_keep(node, prover.writes) or "inside of a sub-graph"
            for site in find_attention(inner):
                sites.append((place, dense_inside(site, node, reason)))
    outputs = {site.output for _, site in sites}
    try:
        others = find_unserved(gm.graph, starts, outputs)
    except Exception as error:
        contain(error, "looking for other attention", count_ops(gm))
        others = []
    sites += [(places.get(site.output, len(places)), site) for site in others]
    return [site for _, site in sorted(sites, key=lambda found: found[0])]


def nesting(node: fx.Node) -> int:
    """1 where a transform of torch.func begins (vmap, grad, jvp), -1 where it ends, else 0."""
    name = op_name(node) if node.op == "call_function" else ""
    return name.endswith(NESTING[0]) - name.endswith(NESTING[1])


def transformed(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The dense site of an attention inside of a transform, whose tensors are not what they seem.

    None for a softmax that no product leads to.
    """
    if op_name(node) == "softmax" and trace_scores(node, prover) is None:
        return None
    return site_at(node, "inside of torch.vmap or torch.func: sparse attention has no rule")


def site_at(node: fx.Node, reason: str) -> AttentionSite | None:
    """The dense site of a call about which nothing else is known; None if it has no tensors."""
    tensors = [tensor for tensor in tensor_arguments(node) if len(shape_of(tensor)) > 0]
    if not tensors:
        return None
    query, key, value = tensors[:3] if len(tensors) >= 3 else tensors[:1] * 3
    fields = {"query": query, "key": key, "value": value, "scale": 1.0, "mask": None}
    return make_site(node, **fields, unproven=reason, dense_reason=reason)


def erase_added(graph: fx.Graph, before: Collection[fx.Node]) -> None:
    """Erase the nodes that were added to a graph and that nothing uses."""
    for node in reversed(list(graph.nodes)):
        if node not in before and not node.users:
            graph.erase_node(node)


def dense_inside(site: AttentionSite, call: fx.Node, reason: str) -> AttentionSite:
    """A site of a sub-graph, named after its call, that stays dense."""
    path = module_path(call) or site.path
    if site.dense_reason != NOT_OPENED:
        reason = site.dense_reason or reason
    return replace(site, path=path, layer=layer_index(path), dense_reason=reason)
