"""`minference::attention`: an attention whose mask was never built: its caller said what it is.

It comes from mpass.transformers_attention.
"""

from __future__ import annotations

from typing import Any

from torch import fx

from mpass.graph.nodes import value_of
from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.match.common import gradient_reason, make_site, shape_reason

TARGET = "minference.attention.default"
PROOF = "told by attn_implementation='minference'"


def match_marked(node: fx.Node, _prover: object) -> AttentionSite | None:
    """The site of a marked attention; None if the node is none."""
    if node.op != "call_function" or str(node.target) != TARGET:
        return None
    arguments: Any = node.args
    query, key, value, key_mask, sinks, offset, window, causal, scale, softcap = arguments
    if isinstance(offset, fx.Node):
        offset = value_of(offset)
    mask = MaskMeaning(
        causal=bool(causal),
        query_offset=offset,
        window=window,
        key_mask=key_mask,
        proof=(PROOF,),
    )
    return make_site(
        node,
        "minference",
        query=query,
        key=key,
        value=value,
        scale=scale,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        dense_reason=shape_reason(query, key, value) or gradient_reason(node),
    )
