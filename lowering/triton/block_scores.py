"""Blocks by the exponentials of whole query tiles, by generated kernels.

The meaning stands in mpass.lowering.reference.block_scores; pooled keys are rounded to the keys'
dtype. Letters: B batch, h heads asked for, I query blocks, S pooled keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mpass.lowering.index import BLOCK, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_scores import BlockScoresRule, block_scores_width
from mpass.lowering.triton.launch import device_ints, launch
from mpass.lowering.triton.list_blocks import (
    ListRule,
    empty_lists,
    group_by_kind,
    list_blocks,
    numbers_of,
    score_chunks,
)
from mpass.lowering.triton.pooled_keys import kernel_inputs, pooled_keys, score_arguments


def block_scores_index(inputs: EstimateInputs, rules: Sequence[BlockScoresRule]) -> SparseIndex:
    """As mpass.lowering.reference.block_scores.

    Heads of one block size and kind of cut are taken together.
    """
    inputs = kernel_inputs(inputs)
    query, mask, batch = inputs.query, inputs.mask, inputs.batch
    index = empty_lists(inputs, block_scores_width(rules))
    kinds = [(rule.block_size, rule.share is None) for rule in rules]
    for (size, by_mass), places in group_by_kind(kinds):
        count = len(places)
        lists = [block_scores_list_rule(i, rules[i]) for i in places]
        ints = device_ints([*(inputs.heads[i] for i in places), *numbers_of(lists)], query.device)
        head_of, rule_ints = ints.split([count, 8 * count])
        pooled = pooled_keys(inputs.key, mask, size)
        num_runs = pooled.means.shape[2]
        spec, common = score_arguments("tile_scores", inputs, pooled, head_of)
        for start, stop in score_chunks(index, mask, count, num_runs, size // BLOCK):
            scores = torch.empty(batch, count, stop - start, num_runs, device=query.device)
            launch(
                spec,
                "score_tiles",
                (stop - start, count, batch),
                scores=scores,
                first_block=inputs.first_block + start,
                size=size,
                **common,
            )
            list_blocks(
                index,
                scores,
                "mass" if by_mass else "share",
                rule_ints,
                inputs,
                rows=(start, stop),
                first_score_row=inputs.first_block + start,
                repeat=size // BLOCK,
            )
    return index


def block_scores_list_rule(slot: int, rule: BlockScoresRule) -> ListRule:
    """A BlockScoresRule as the listing kernel takes it."""
    share = rule.mass if rule.share is None else rule.share
    assert share is not None  # one of both is given
    return ListRule(
        slot,
        rule.max_blocks * BLOCK // rule.block_size,
        rule.sink_blocks,
        rule.local_blocks,
        rule.last_blocks,
        share,
    )
