"""Blocks by the exponentials of whole query tiles, cut off at a share of the best or of the mass.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, C tiles of a chunk,
J key blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mpass.lowering.distance_bias import run_line
from mpass.lowering.index import IndexWidth, SparseIndex
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import (
    candidates,
    keep_above,
    keep_mass,
    list_index,
    tiled,
)
from mpass.lowering.reference.pooled_keys import pooled_keys, tile_scores


@dataclass(frozen=True, slots=True)
class BlockScoresRule:
    """What one head keeps; see mpass.patterns.block_max and block_top_p.

    share: of the best block's score, from which on a block is kept; mass: share of all scores that
    the kept blocks hold. One of them is None.
    """

    share: float | None
    mass: float | None
    block_size: int
    sink_blocks: int
    local_blocks: int
    last_blocks: int
    max_blocks: int


def block_scores_index(inputs: EstimateInputs, rules: Sequence[BlockScoresRule]) -> SparseIndex:
    """The index of patterns that score query tiles against pooled keys, with one rule per head.

    Blocks that score at least a share of the best one are kept, or the best ones that hold a share
    of all scores.
    """
    query, key, mask, heads = inputs.query, inputs.key, inputs.mask, inputs.heads
    pooled = [
        pooled_keys(key[:, head // inputs.group], mask, rule.block_size, rule.block_size)
        for head, rule in zip(heads, rules, strict=True)
    ]

    lines = inputs.bias_lines()

    def kept_tiles(i: int, tiles: Tensor) -> Tensor:
        rule, line = rules[i], lines[i]
        size = rule.block_size
        scores = tile_scores(
            query[:, heads[i]],
            *pooled[i],
            mask,
            tiles,
            scale=inputs.scale,
            block_size=size,
            bias=None if line is None else run_line(line, size),
        )
        choice = candidates(
            query,
            key,
            mask,
            tiles,
            scores,
            sink_blocks=rule.sink_blocks,
            local_blocks=rule.local_blocks,
            last_blocks=rule.last_blocks,
            max_blocks=rule.max_blocks,
            block_size=size,
        )
        if rule.share is not None:
            return keep_above(choice, rule.share)
        assert rule.mass is not None
        return keep_mass(choice, rule.mass)

    def kept_blocks(i: int, blocks: Tensor) -> Tensor:
        return tiled(kept_tiles, rules[i].block_size, mask, key.shape[2])(i, blocks)

    return list_index(query, mask, len(heads), block_scores_width(rules), kept_blocks)


def block_scores_width(rules: Sequence[BlockScoresRule]) -> IndexWidth:
    """Buffer sizes of `block_scores_index`, from the limits alone."""
    return IndexWidth(max_blocks=max(rule.max_blocks for rule in rules))
