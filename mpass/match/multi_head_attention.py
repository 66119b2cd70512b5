"""nn.MultiheadAttention and nn.TransformerEncoderLayer: opaque ops that project inside.

Their query, key and value do not exist in the graph, so they stay dense, and say so.
"""

from __future__ import annotations

import torch
from torch import fx

from mpass.graph.arguments import tensor_arguments
from mpass.graph.site import AttentionSite
from mpass.masks.prover import MaskProver
from mpass.match.common import make_site
from mpass.match.spelling import Spelling

OPS = {
    torch.nn.functional.multi_head_attention_forward: "nn.MultiheadAttention",
    torch._transformer_encoder_layer_fwd: "nn.TransformerEncoderLayer's fast path",
    torch._native_multi_head_attention: "nn.MultiheadAttention's fast path",
}

OP_NAMES = frozenset({function.__name__.strip("_") for function in OPS})


def match_multi_head_attention(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The dense site of an opaque multi-head attention; None if the node is none."""
    if node.op != "call_function" or node.target not in OPS:
        return None
    tensors = list(tensor_arguments(node))
    if not tensors:
        return None
    fused = node.target is torch._transformer_encoder_layer_fwd
    query, key, value = tensors[:1] * 3 if fused or len(tensors) < 3 else tensors[:3]
    reason = (
        f"{OPS[node.target]} projects query, key and value inside of one op: "
        "call scaled_dot_product_attention on them instead"
    )
    return make_site(
        node,
        query=query,
        key=key,
        value=value,
        scale=1.0,
        mask=None,
        unproven=reason,
        dense_reason=reason,
    )


SPELLING = Spelling("mha", match_multi_head_attention, OP_NAMES)
