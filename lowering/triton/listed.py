"""flex_attention as its lists of blocks say, by a generated kernel that decides on the device.

The meaning stands in mpass.lowering.block_mask. Letters: B batch, H query heads, Nq queries, Dv
value dim.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.lowering.block_mask import BlockLists, lists_agree, visits
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.attention import LOG2_E, kernel_operands, mask_bytes
from mpass.lowering.triton.launch import DTYPES, launch, strides, target_for
from mpass.lowering.triton.spec import TritonKernelSpec

TILE = 32
"""Queries, and keys, of a step: speed is not what this is for."""


def correct_as_listed(out: Tensor, inputs: AttentionInputs, lists: BlockLists) -> None:
    """Overwrite `out` [B, H, Nq, Dv] by what the lists say where they do not agree with the mask.

    One launch that does nothing where they do: the host learns nothing of it.
    """
    inputs = kernel_operands(inputs)
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    scale, softcap = inputs.scale, inputs.softcap
    batch, heads, num_queries, head_dim = query.shape
    num_keys = key.shape[2]
    if 0 in (*out.shape, num_keys):
        return
    agree = lists_agree(lists, mask, num_queries, num_keys).to(torch.uint8).view(1)
    partial, full = (count.int() for count in visits(lists, num_queries, num_keys))
    own_batch, own_heads, num_rows, num_columns = partial.shape
    spec = TritonKernelSpec(
        template="listed",
        dtype=DTYPES[query.dtype],
        head_dim=head_dim,
        value_dim=value.shape[-1],
        tile=TILE,
        causal=mask.causal,
        window=mask.window > 0,
        padding=mask.key_mask is not None,
        softcap=softcap > 0,
        target=target_for(query.device),
    )
    launch(
        spec,
        "attend_as_listed",
        (-(-num_queries // TILE), heads, batch),
        out=out,
        agree=agree,
        query=query,
        key=key,
        value=value,
        partial_visits=partial.contiguous(),
        full_visits=full.contiguous(),
        key_mask=mask_bytes(mask, agree),
        **strides("query", query),
        **strides("key", key),
        **strides("value", value),
        **strides("out", out),
        num_queries=num_queries,
        num_keys=num_keys,
        num_rows=num_rows,
        num_columns=num_columns,
        query_block=lists.query_block,
        key_block=lists.key_block,
        list_stride_b=own_heads * num_rows * num_columns if own_batch > 1 else 0,
        list_stride_h=num_rows * num_columns if own_heads > 1 else 0,
        query_offset=mask.query_offset,
        group=heads // key.shape[1],
        window=mask.window,
        score_scale=2.0 * LOG2_E * scale / softcap if softcap > 0 else scale * LOG2_E,
        softcap=softcap * LOG2_E,
    )
