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

from mpass.lowering.index import BLOCK, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.flex_prefill import (
    FlexPrefillChoice,
    FlexPrefillRule,
    choose,
    flex_prefill_width,
)
from mpass.lowering.triton.launch import device_ints
from mpass.lowering.triton.list_blocks import (
    SCORE_BYTES,
    ListRule,
    empty_lists,
    group_by_kind,
    list_blocks,
    numbers_of,
)
from mpass.lowering.triton.pooled_keys import kernel_inputs

SMALLEST_SCORE = 1e-30
"""Scores are at least this, so that their sign can tell which blocks are wanted."""


def flex_prefill_index(inputs: EstimateInputs, rules: Sequence[FlexPrefillRule]) -> SparseIndex:
    """As mpass.lowering.reference.flex_prefill.

    Heads of one rule are taken together, as many at a time as SCORE_BYTES hold the largest tensor
    of.
    """
    inputs = kernel_inputs(inputs)
    index = empty_lists(inputs, flex_prefill_width(rules))
    batch, num_queries, num_keys = inputs.batch, inputs.num_queries, inputs.num_keys
    if 0 in (batch, inputs.num_blocks, num_keys):
        return index
    for numbers, places in group_by_kind([dataclasses.astuple(rule) for rule in rules]):
        rule = FlexPrefillRule(*numbers)
        size = rule.block_size
        # Distances of the last queries to all keys, and ranks of all pairs of blocks, are int64.
        largest = max(size * num_keys, num_queries * num_keys // size**2)
        together = max(1, SCORE_BYTES // (8 * batch * largest))
        for start in range(0, len(places), together):
            some = places[start : start + together]
            lists = [flex_prefill_list_rule(i, rule) for i in some]
            list_blocks(
                index,
                pair_scores(inputs, [inputs.heads[i] for i in some], rule),
                "row_mass",
                device_ints(numbers_of(lists), inputs.query.device),
                inputs,
                rows=(0, inputs.num_blocks),
                first_score_row=inputs.mask.query_offset // size,
                repeat=size // BLOCK,
            )
    return index


def flex_prefill_list_rule(slot: int, rule: FlexPrefillRule) -> ListRule:
    """A FlexPrefillRule as the listing kernel takes it: wanted blocks, no share of the others."""
    limit = rule.max_blocks * BLOCK // rule.block_size
    return ListRule(slot, limit, rule.sink_blocks, rule.local_blocks, rule.last_blocks, 0.0)


def pair_scores(inputs: EstimateInputs, heads: Sequence[int], rule: FlexPrefillRule) -> Tensor:
    """Scores of all pairs of blocks, negative where the rule wants them: fp32 [B, h, I, J]."""
    query = torch.stack([inputs.query[:, head] for head in heads], 1)
    key = torch.stack([inputs.key[:, head // inputs.group] for head in heads], 1)
    mask = inputs.mask
    if mask.key_mask is not None:
        key_mask = mask.key_mask[:, None].expand(-1, len(heads), -1).flatten(0, 1)
        mask = dataclasses.replace(mask, key_mask=key_mask)
    choice = choose(query.flatten(0, 1), key.flatten(0, 1), mask, rule, scale=inputs.scale)
    scores, wanted = scores_of(choice, mask.query_offset // rule.block_size)
    scores = scores.clamp(min=SMALLEST_SCORE)
    return torch.where(wanted, -scores, scores).unflatten(0, (inputs.batch, len(heads)))


def scores_of(choice: FlexPrefillChoice, first_block: int) -> tuple[Tensor, Tensor]:
    """Scores of all pairs of blocks, fp32 [B, I, J], and which are wanted, bool."""
    blocks = torch.arange(choice.pooled.shape[1], device=choice.pooled.device) + first_block
    distance = blocks[:, None] - torch.arange(choice.pooled.shape[2], device=blocks.device)
    distance = distance.clamp(min=0)
    aware = choice.query_aware[:, None, None]
    wanted = choice.vertical[:, None, :] | choice.slash[:, distance]
    wanted |= aware & choice.pooled_kept
    scores = choice.vertical_score[:, None, :] + choice.slash_score[:, distance]
    return torch.where(aware, choice.pooled, scores), wanted
