"""`minference::attention`: an attention whose mask was never built: its caller said what it is.

It comes from mpass.serving.transformers_attention.
"""

from __future__ import annotations

from torch import fx

from mpass.graph.arguments import bind
from mpass.graph.nodes import value_of
from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.match.common import gradient_reason, make_site, shape_reason
from mpass.match.spelling import Spelling

OP_NAME = "minference::attention"
TARGETS = ("minference.attention.default", "minference.attention")
"""The op as it stands in a graph: its one overload, or the name that a user calls it by."""

ARGUMENTS = ("query key value key_mask sinks query_offset window causal scale softcap").split()
"""The op's arguments; mpass.lowering.ops has them."""

PROOF = "told by attn_implementation='minference'"


def match_minference_op(node: fx.Node, _prover: object) -> AttentionSite | None:
    """The site of a call of `minference::attention`; None if the node is none."""
    if node.op != "call_function" or str(node.target) not in TARGETS:
        return None
    arguments = bind(node)
    if any(name not in arguments for name in ARGUMENTS):
        return None
    query, key, value, key_mask, sinks, offset, window, causal, scale, softcap = (
        arguments[name] for name in ARGUMENTS
    )
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
        query=query,
        key=key,
        value=value,
        scale=scale,
        mask=mask,
        softcap=softcap,
        sinks=sinks,
        dense_reason=shape_reason(query, key, value) or gradient_reason(node),
    )


SPELLING = Spelling("minference", match_minference_op, frozenset({OP_NAME}))
