"""Lists of key blocks from their scores, by a generated kernel: what estimators of blocks share.

The kernel is templates/blocks.py.jinja. Long prompts take their query blocks in chunks, so that the
scores and their ranks need no more than SCORE_BYTES. Letters: B batch, h heads asked for, I query
blocks, J key blocks.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from mpass.lowering.index import (
    AttentionMask,
    IndexWidth,
    SparseIndex,
    empty_index,
    first_query_block,
    list_slots,
    num_key_blocks,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_lists import last_query
from mpass.lowering.reference.selection import first_keys
from mpass.lowering.triton.launch import launch, target_for
from mpass.lowering.triton.spec import SELECT_TILE, Rule, TritonKernelSpec

Kind = TypeVar("Kind", bound=int | tuple[float, ...])

SCORE_BYTES = 1 << 29
"""Most memory of block scores and ranks at a time; longer prompts are taken in chunks."""


@dataclass(frozen=True, slots=True)
class ListRule:
    """What one head keeps, as templates/blocks.py.jinja takes it.

    slot: row of the lists; limit and the numbers of forced blocks count blocks of the scores' size;
    share: of the best score or of all scores.
    """

    slot: int
    limit: int
    sink_blocks: int = 0
    local_blocks: int = 0
    last_blocks: int = 0
    share: float = 0.0

    def numbers(self) -> tuple[int, ...]:
        """As int32 of the `rules` argument."""
        forced = (self.sink_blocks, self.local_blocks, self.last_blocks)
        return (self.slot, self.limit, *forced, float_bits(self.share), 0, 0)


def float_bits(value: float) -> int:
    """The int32 with the bits of a float32."""
    bits: int = struct.unpack("<i", struct.pack("<f", value))[0]
    return bits


def empty_lists(inputs: EstimateInputs, width: IndexWidth) -> SparseIndex:
    """An index in list form that an estimator is to fill."""
    return empty_index(inputs.query, inputs.num_blocks, width, list_slots(len(inputs.heads)))


def group_by_kind(kinds: Sequence[Kind]) -> Iterator[tuple[Kind, list[int]]]:
    """Every kind once with the positions where it stands: what may run in one launch."""
    for kind in sorted(set(kinds)):
        yield kind, [i for i, other in enumerate(kinds) if other == kind]


def numbers_of(rules: Sequence[ListRule]) -> list[int]:
    """All rules in a row, as `device_ints` takes them."""
    return [number for rule in rules for number in rule.numbers()]


def score_chunks(
    index: SparseIndex,
    mask: AttentionMask,
    count: int,
    score_blocks: int,
    repeat: int,
    *,
    score_bytes: int = 8,
    most_bytes: int | None = None,
) -> Iterator[tuple[int, int]]:
    """Ranges of query blocks whose scores exist at the same time, in whole tiles of `repeat`.

    count: heads; score_blocks: scores of a query block and head; score_bytes: memory of one, with
    its rank; most_bytes: of all at the same time, SCORE_BYTES if None. Empty without scores.
    """
    batch, _, rows = index.block_count.shape
    if 0 in (batch, count, score_blocks):
        return
    most_bytes = SCORE_BYTES if most_bytes is None else most_bytes
    step = max(1, most_bytes // (score_bytes * batch * count * score_blocks) // repeat) * repeat
    first = first_query_block(mask.query_offset)
    start = 0
    while start < rows:
        stop = min(rows, (first + start) // repeat * repeat + step - first)
        yield start, stop
        start = stop


def list_blocks(
    index: SparseIndex,
    scores: Tensor,
    rule: Rule,
    rules: Tensor,
    inputs: EstimateInputs,
    *,
    rows: tuple[int, int],
    first_score_row: int,
    repeat: int,
) -> None:
    """Fill the lists of some query blocks of `index` from their scores.

    scores: fp32 [B, h, rows, J], of key blocks of `repeat` times BLOCK keys; rules: int32 [h * 8],
    ListRule.numbers of each; rows: first query block of the lists and the one after the last;
    first_score_row: of `scores`, see templates/blocks.py.jinja.
    """
    mask = inputs.mask
    batch, count, score_rows, score_blocks = scores.shape
    start, stop = rows
    padding = mask.key_mask is not None and rule != "top_k"
    rank_chunks = -(-score_blocks // SELECT_TILE)
    shape = batch, count, stop - start, rank_chunks * SELECT_TILE
    launch(
        TritonKernelSpec(
            template="blocks",
            tile=SELECT_TILE,
            rule=rule,
            causal=mask.causal,
            window=mask.window > 0,
            padding=padding,
            num_warps=1,
            target=target_for(scores.device),
        ),
        "list_blocks",
        (stop - start, count, batch),
        block_count=index.block_count,
        block_index=index.block_index,
        scores=scores,
        rules=rules,
        ranks=torch.empty(shape, dtype=torch.int32, device=scores.device),
        bounds=real_bounds(inputs) if padding else rules,
        first_row=start,
        num_rows=index.block_count.shape[2],
        num_lists=index.block_count.shape[1],
        max_blocks=index.block_index.shape[-1],
        num_blocks=num_key_blocks(inputs.num_keys),
        score_rows=score_rows,
        score_blocks=score_blocks,
        first_score_row=first_score_row,
        repeat=repeat,
        query_block=inputs.first_block,
        last_position=mask.query_offset + inputs.num_queries - 1,
        window=mask.window,
        rank_chunks=rank_chunks,
    )


def real_bounds(inputs: EstimateInputs) -> Tensor:
    """Positions of the first real key and of the last real query (-1: none), int32 [B, 2]."""
    mask, batch, device = inputs.mask, inputs.batch, inputs.query.device
    bounds = first_keys(mask, batch, device), last_query(mask, batch, inputs.num_queries, device)
    return torch.stack(bounds, -1).to(torch.int32)
