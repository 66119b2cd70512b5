"""Dense attention under an `AttentionMask`, without ever building an N x N tensor.

What an op runs when sparse would not pay: torch's own fused attention, a chunk of queries at a time
where the mask is more than plain causal.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.lowering.crossover import EstimatedWork
from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import (
    allowed_cells,
    empty_output,
    masked_softmax,
    repeat_kv,
)

CHUNK = 512
"""Queries per call where a mask is needed: it is [B, 1, CHUNK, visible keys]."""


def dense_attention(inputs: AttentionInputs) -> Tensor:
    """Softmax attention over all keys that the mask allows: [B, H, Nq, Dv].

    Rows with nothing to see give zeros.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    scale, softcap, sink_logits = inputs.scale, inputs.softcap, inputs.sink_logits
    bias = inputs.distance_bias
    plain = mask.window == 0 and mask.key_mask is None and softcap == 0 and sink_logits is None
    plain = plain and bias is None
    square = mask.query_offset == 0 and query.shape[2] <= key.shape[2]
    if plain and (square or not mask.causal):
        # Causal is aligned to the upper left: keys after the last query are never seen.
        if mask.causal:
            key, value = key[:, :, : query.shape[2]], value[:, :, : query.shape[2]]
        out = F.scaled_dot_product_attention(
            query, key, value, is_causal=mask.causal, scale=scale, enable_gqa=True
        )
        return empty_output(query, value).copy_(out) if out.stride(1) > out.stride(2) else out
    out = empty_output(query, value)
    for start in range(0, query.shape[2], CHUNK):
        stop = min(query.shape[2], start + CHUNK)
        offset = mask.query_offset
        positions = torch.arange(start + offset, stop + offset, device=query.device)
        first, last = visible_range(mask, start + offset, stop - 1 + offset, key.shape[2])
        allowed = allowed_cells(mask, positions, key.shape[2])[..., first:last]
        keys, values = key[:, :, first:last], value[:, :, first:last]
        rows = query[:, :, start:stop]
        if softcap > 0 or sink_logits is not None or bias is not None:
            scores = rows.float() @ repeat_kv(keys, query.shape[1]).float().mT * scale
            if bias is not None:
                own = torch.arange(start, stop, device=query.device)
                scores += bias_rows(bias.float(), own, query.shape[2], first, last)
            if softcap > 0:
                scores = softcap * torch.tanh(scores / softcap)
            weights = masked_softmax(scores, allowed, sink_logits)
            chunk = weights @ repeat_kv(values, query.shape[1]).float()
        else:
            chunk = F.scaled_dot_product_attention(
                rows, keys, values, attn_mask=allowed, scale=scale, enable_gqa=True
            )
            chunk = chunk.masked_fill(~allowed.any(-1, keepdim=True), 0.0)
        out[:, :, start:stop] = chunk.to(out.dtype)
    return out


def visible_range(mask: AttentionMask, first: int, last: int, num_keys: int) -> tuple[int, int]:
    """Keys [start, stop) that queries at positions first..last can see at most."""
    ahead = 1 if mask.causal else mask.window
    stop = min(num_keys, last + ahead) if ahead else num_keys
    start = max(0, first - mask.window + 1) if mask.window > 0 else 0
    return min(start, stop), stop


def estimation_worthwhile(work: EstimatedWork) -> bool:
    """Whether an index may save more than finding it costs: not in plain torch, see below."""
    return False


def breakeven_density(inputs: AttentionInputs) -> float:
    """Share of the dense work up to which sparse attention is no slower: none in plain torch.

    mpass.lowering.reference.attention does all of the work and masks it; lowerings bring their own.
    """
    return 0.0
