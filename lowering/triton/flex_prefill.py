"""FlexPrefill's lists: chosen by batched torch ops, listed by a generated kernel.

The meaning stands in mpass.lowering.reference.flex_prefill, whose `choose` runs on several heads
at once here, as if they were batch rows. Letters: B batch, h heads asked for, H query heads, Hk kv
heads, Nq queries, Nk keys, D head_dim, I query blocks, J key blocks, both of `block_size`
positions.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.index import (
    BLOCK,
    AttentionMask,
    SparseIndex,
    empty_index,
    list_slots,
    num_query_blocks,
)
from mpass.lowering.reference.flex_prefill import FlexChoice, FlexRule, choose, flex_width
from mpass.lowering.triton.block_scores import SCORE_BYTES, ListRule, alike, list_blocks, numbers_of
from mpass.lowering.triton.launch import device_ints
from mpass.lowering.triton.pooled_keys import kernel_inputs

SMALLEST_SCORE = 1e-30
"""Scores are at least this, so that their sign can tell which blocks are wanted."""


def flex_index(
    query: Tensor,
    key: Tensor,
    mask: AttentionMask,
    heads: Sequence[int],
    rules: Sequence[FlexRule],
    *,
    scale: float,
) -> SparseIndex:
    """As mpass.lowering.reference.flex_prefill.flex_index.

    query [B, H, Nq, D], key [B, Hk, Nk, D]; rules: one per head of `heads`. Heads of one rule are
    taken together, as many at a time as SCORE_BYTES hold the largest tensor of.
    """
    query, key = kernel_inputs(query, key)
    batch, num_queries, num_keys = query.shape[0], query.shape[2], key.shape[2]
    rows = num_query_blocks(num_queries, mask.query_offset)
    index = empty_index(query, rows, flex_width(rules), list_slots(len(heads)))
    if 0 in (batch, rows, num_keys):
        return index
    group = query.shape[1] // key.shape[1]
    for numbers, places in alike([dataclasses.astuple(rule) for rule in rules]):
        rule = FlexRule(*numbers)
        size = rule.block_size
        # Distances of the last queries to all keys, and ranks of all pairs of blocks, are int64.
        largest = max(size * num_keys, num_queries * num_keys // size**2)
        together = max(1, SCORE_BYTES // (8 * batch * largest))
        for start in range(0, len(places), together):
            some = places[start : start + together]
            scores = block_scores(
                torch.stack([query[:, heads[i]] for i in some], 1),
                torch.stack([key[:, heads[i] // group] for i in some], 1),
                mask,
                rule,
                scale=scale,
            )
            lists = [flex_list_rule(i, rule) for i in some]
            list_blocks(
                index,
                scores,
                "row_mass",
                device_ints(numbers_of(lists), query.device),
                query,
                key,
                mask,
                rows=(0, rows),
                first_score_row=mask.query_offset // size,
                repeat=size // BLOCK,
            )
    return index


def flex_list_rule(slot: int, rule: FlexRule) -> ListRule:
    """A FlexRule as the listing kernel takes it: the wanted blocks, no share of the others."""
    limit = rule.max_blocks * BLOCK // rule.block_size
    return ListRule(slot, limit, rule.sink_blocks, rule.local_blocks, rule.last_blocks, 0.0)


def block_scores(
    query: Tensor, key: Tensor, mask: AttentionMask, rule: FlexRule, *, scale: float
) -> Tensor:
    """Scores of all pairs of blocks, negative where the rule wants them: fp32 [B, h, I, J].

    query [B, h, Nq, D], key [B, h, Nk, D].
    """
    batch, heads = query.shape[:2]
    if mask.key_mask is not None:
        key_mask = mask.key_mask[:, None].expand(-1, heads, -1).flatten(0, 1)
        mask = dataclasses.replace(mask, key_mask=key_mask)
    choice = choose(query.flatten(0, 1), key.flatten(0, 1), mask, rule, scale=scale)
    scores, wanted = scores_of(choice, mask.query_offset // rule.block_size)
    scores = scores.clamp(min=SMALLEST_SCORE)
    return torch.where(wanted, -scores, scores).unflatten(0, (batch, heads))


def scores_of(choice: FlexChoice, first_block: int) -> tuple[Tensor, Tensor]:
    """Scores of all pairs of blocks, fp32 [B, I, J], and which are wanted, bool."""
    blocks = torch.arange(choice.pooled.shape[1], device=choice.pooled.device) + first_block
    distance = blocks[:, None] - torch.arange(choice.pooled.shape[2], device=blocks.device)
    distance = distance.clamp(min=0)
    aware = choice.query_aware[:, None, None]
    wanted = choice.vertical[:, None, :] | choice.slash[:, distance]
    wanted |= aware & choice.pooled_kept
    scores = choice.vertical_score[:, None, :] + choice.slash_score[:, distance]
    return torch.where(aware, choice.pooled, scores), wanted
