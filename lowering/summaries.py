"""Sparse attention in which the keys that are left out count as well, by the mean of each run.

A run of neighbouring keys that a query block does not select stands in its softmax as that many
keys that all equal their mean, with the mean of their values. Vision transformers attend to much at
once: leaving keys out changes what they compute more than where they look, and the means give back
most of it (docs/systems.md has the figures). The branch is that of VSA (arXiv 2505.13389) without
its gate, which is trained. It is for attention that is not causal.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, S runs.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from mpass.lowering.define import define_op, fake_of
from mpass.lowering.index import (
    BLOCK,
    SparseIndex,
    first_query_block,
    num_key_blocks,
)
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.ops import ATTENTION, ATTENTION_SCHEMA, Computation, over_index
from mpass.lowering.ops import attend as attend_or_dense
from mpass.lowering.reference.attention import (
    empty_output,
    query_chunks,
    repeat_kv,
    selected_blocks,
    selected_columns,
)

RUNS = (8, 16, 32, 64)
"""Numbers of keys that one mean may stand for: they divide a block."""


def with_summaries(
    inputs: AttentionInputs, index: SparseIndex, out: Tensor, lse: Tensor, run: int
) -> Tensor:
    """Attention over selected keys and over the means of the others: [B, H, Nq, Dv], into `out`.

    out, lse: sparse attention over `index` and its log-sum-exps [B, H, Nq]; run: keys per mean. A
    row with nothing to see stays zero. The sums are in fp32, of fp64 inputs in fp64.
    """
    query, mask = inputs.query, inputs.mask
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    means, values, counts = run_means(inputs, index, run, wide)
    first = first_query_block(mask.query_offset)
    blocks = num_key_blocks(inputs.key.shape[2])
    for rows in query_chunks(query.shape[2], mask.query_offset):
        begin, end = rows.start + mask.query_offset, rows.stop + mask.query_offset
        own = torch.arange(begin // BLOCK, (end - 1) // BLOCK + 1, device=query.device)
        selected = selected_blocks(index, own - first, own, blocks, stop=(end - 1) // BLOCK + 1)
        local = torch.arange(begin, end, device=query.device) // BLOCK - begin // BLOCK
        left = ~selected.repeat_interleave(BLOCK // run, -1)[:, :, local]
        scores = query[:, :, rows].to(wide) @ means.mT * inputs.scale + counts.log()[:, :, None]
        scores = scores.masked_fill(~left, -torch.inf)
        rest = torch.logsumexp(scores, -1)
        total = torch.logaddexp(rest, lse[:, :, rows].to(wide))
        seen = total > -torch.inf
        weights = (scores - torch.where(seen, total, 0.0)[..., None]).exp()
        kept = torch.where(seen, (lse[:, :, rows].to(wide) - total).exp(), 0.0)
        sums = out[:, :, rows].to(wide) * kept[..., None] + weights @ values
        out[:, :, rows] = sums.to(out.dtype)
    return out


def run_means(
    inputs: AttentionInputs, index: SparseIndex, run: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Mean key [B, H, S, D], mean value [B, H, S, Dv] and number of keys [B, H or 1, S] per run.

    Padding does not count, nor do a head's vertical columns: they are computed as they are. Whole
    blocks are covered: runs beyond the last key have no keys.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    batch, num_keys, heads = key.shape[0], key.shape[2], query.shape[1]
    real = torch.ones(batch, 1, num_keys, dtype=torch.bool, device=key.device)
    if inputs.mask.key_mask is not None:
        real = inputs.mask.key_mask[:, None]
    if index.column_index.shape[-1]:
        real = real & ~selected_columns(index, batch, num_keys)
    tail = num_key_blocks(num_keys) * BLOCK - num_keys
    weight = torch.nn.functional.pad(real.to(dtype), (0, tail)).unflatten(-1, (-1, run))
    counts = weight.sum(-1)

    def mean(tensor: Tensor) -> Tensor:
        whole = tensor if weight.shape[1] == 1 else repeat_kv(tensor, heads)
        padded = torch.nn.functional.pad(whole.to(dtype), (0, 0, 0, tail)).unflatten(2, (-1, run))
        sums = (padded * weight[..., None]).sum(3)
        return repeat_kv(sums / counts.clamp(min=1)[..., None], heads)

    return mean(key), mean(value), counts


@define_op(
    "sparse_attention_summaries",
    f"(int run, {ATTENTION_SCHEMA}) -> Tensor",
)
def sparse_attention_summaries(run: int, *arguments: Any) -> Tensor:
    """`minference::sparse_attention`, which see, and a key for each run of `run` keys left out.

    It is for attention without causality, window and softcap. What is recorded is the density of
    the selected keys; the means add 1 / run of the rest.
    """
    call = over_index(*arguments)
    computation = Computation(
        lambda lowering, given, own: with_summaries(
            given, own, *lowering.sparse_attention_lse(given, own), run
        ),
        ATTENTION.dense,
        ATTENTION.plain,
    )
    # Means are work, too: they take the place of as many selected keys, and of a softmax in torch.
    if call.dense_above < 1.0:
        call = replace(call, dense_above=max(0.0, call.dense_above - 2.0 / run))
    return attend_or_dense(call, computation).result


@fake_of("sparse_attention_summaries")
def _(run: int, query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return empty_output(query, value)
