"""Blocks by estimated attention and vertical columns by that of the last queries, by kernels.

The meaning stands in mpass.lowering.reference.union; pooled keys, and the query rows that score
them, are rounded to 8-bit numbers where the chip multiplies these fast, or to the keys' dtype.
Letters: B batch, h heads asked for, I query blocks, J key blocks, S pooled keys.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

from mpass.lowering.distance_bias import run_line
from mpass.lowering.index import BLOCK, SparseIndex, num_key_blocks
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.union import VerticalBlockRule, vertical_block_width
from mpass.lowering.triton.launch import device_ints, launch, target_for
from mpass.lowering.triton.list_blocks import (
    ListRule,
    empty_lists,
    float_bits,
    group_by_kind,
    list_blocks,
    numbers_of,
    score_chunks,
)
from mpass.lowering.triton.pooled_keys import kernel_inputs, pooled_keys, score_arguments
from mpass.lowering.triton.sample_attention import runs_of, sampled_sums
from mpass.lowering.triton.spec import (
    INT8_TARGETS,
    SCORE_STAGES,
    TritonKernelSpec,
    row_score_warps,
    score_lines,
    score_programs,
)
from mpass.lowering.triton.vertical_slash import bias_lines, last_query_sums, list_columns

INTERPRETED_PROGRAMS = 3
"""Programs of `score_rows` in the interpreter: fewer than there are pieces of work, as on a GPU."""


def vertical_block_index(inputs: EstimateInputs, rules: Sequence[VerticalBlockRule]) -> SparseIndex:
    """As mpass.lowering.reference.union."""
    return vertical_block_index_by(inputs, rules)


def vertical_block_index_by(
    inputs: EstimateInputs,
    rules: Sequence[VerticalBlockRule],
    *,
    int8: bool | None = None,
    lines: int | None = None,
) -> SparseIndex:
    """`vertical_block_index` by one form of its kernels.

    Heads that sample the same query rows and pool the same number of keys are taken together.
    int8, lines: what measurements try instead of the usual, see TritonKernelSpec.
    """
    target = target_for(inputs.query.device)
    if int8 is None:
        int8 = inputs.query.dtype != torch.float32 and target in INT8_TARGETS
    lines = lines or score_lines(int8)
    inputs = kernel_inputs(inputs)
    query, mask, batch = inputs.query, inputs.mask, inputs.batch
    width = vertical_block_width(rules)
    index = empty_lists(inputs, width)
    num_blocks, biased = num_key_blocks(inputs.num_keys), inputs.distance_bias is not None
    for (sampled, pool), count, numbers in groups_of(tuple(rules), tuple(inputs.heads)):
        ints = device_ints(numbers, query.device)
        head_of, row_shares, rule_ints = ints.split([count, count, 8 * count])
        spec, common = score_arguments(
            "row_scores",
            inputs,
            pooled_keys(inputs.key, mask, pool, int8=int8),
            head_of,
            rows=sampled,
            pool=pool,
            lines=lines,
            int8=int8,
            num_warps=row_score_warps(query.shape[-1], biased) * lines // BLOCK,
            num_stages=SCORE_STAGES,
            biased=biased,
        )
        if inputs.distance_bias is not None:
            runs = run_line(inputs.distance_bias.to(torch.float32), pool)
            common |= bias_lines(runs, inputs.num_queries)
        for start, stop in score_chunks(index, mask, count, num_blocks, 1):
            scores = torch.empty(batch, count, stop - start, num_blocks, device=query.device)
            tiles = -(-(stop - start) * sampled // lines)
            programs = min(tiles * count * batch, resident_programs(query.device, spec))
            parts, maxima = kept_parts(spec, programs, num_blocks, query.device)
            launch(
                spec,
                "score_rows",
                (programs,),
                scores=scores,
                parts=parts,
                maxima=maxima,
                num_tiles=tiles,
                num_places=count,
                num_pieces=tiles * count * batch,
                row_shares=row_shares,
                first_block=inputs.first_block + start,
                stop_block=inputs.first_block + stop,
                **common,
            )
            list_blocks(
                index,
                scores,
                "row_mass",
                rule_ints,
                inputs,
                rows=(start, stop),
                first_score_row=inputs.first_block + start,
                repeat=1,
            )
    if width.max_columns and 0 not in (len(inputs.heads), inputs.num_keys):
        looking = [rule.last_queries for rule in rules]
        causal = mask.causal
        sums = last_query_sums(inputs, looking)[0] if causal else spread_sums(inputs, looking)
        list_columns(index, sums, [rule.columns for rule in rules], least=0.0)
    return index


def kept_parts(
    spec: TritonKernelSpec, programs: int, num_blocks: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory in which the programs of `score_rows` keep sums per row and key block, and maxima."""
    per_tile = spec.tile * spec.pool // BLOCK
    tiles = -(-num_blocks // per_tile)
    dtype = torch.float32 if spec.dtype == "fp32" else torch.float16
    sums = torch.empty(programs, tiles, spec.lines, per_tile, dtype=dtype, device=device)
    return sums, torch.empty(programs, tiles, spec.lines, device=device)


def resident_programs(device: torch.device, spec: TritonKernelSpec) -> int:
    """Programs of `score_rows` that a device runs at a time; a few where it is interpreted."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return multiprocessors(device) * score_programs(spec)


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many multiprocessors a GPU has."""
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def spread_sums(inputs: EstimateInputs, counts: Sequence[int]) -> Tensor:
    """As mpass.lowering.reference.union.spread_sums; inputs: as `kernel_inputs` gives them."""
    if len(set(counts)) == 1:
        return sampled_sums(inputs, inputs.heads, counts[0])
    sums = torch.empty(inputs.batch, len(counts), inputs.num_keys, device=inputs.query.device)
    for count, places in group_by_kind(counts):
        own = sampled_sums(inputs, [inputs.heads[i] for i in places], count)
        # Slices of the rows: places as an index would be a copy from the host.
        for rows, rows_of in runs_of(places):
            sums[:, rows_of].copy_(own[:, rows])
    return sums


@functools.lru_cache(maxsize=1024)
def groups_of(
    rules: tuple[VerticalBlockRule, ...], heads: tuple[int, ...]
) -> list[tuple[tuple[int, int], int, tuple[int, ...]]]:
    """Heads that are taken together: their kind, how many they are, and what the kernels read.

    That is each head's number, its row share as bits, and its rule, one list after the other. Kept,
    because the same layers ask in each call, while a GPU waits for its host.
    """
    groups = []
    for kind, places in group_by_kind([(rule.rows, rule.pool) for rule in rules]):
        lists = [vertical_block_list_rule(i, rules[i]) for i in places]
        shares = [float_bits(rules[i].row_share) for i in places]
        numbers = (*(heads[i] for i in places), *shares, *numbers_of(lists))
        groups.append((kind, len(places), numbers))
    return groups


def vertical_block_list_rule(slot: int, rule: VerticalBlockRule) -> ListRule:
    """The blocks of a VerticalBlockRule as the listing kernel takes them."""
    forced = (rule.sink_blocks, rule.local_blocks, rule.last_blocks)
    return ListRule(slot, rule.max_blocks, *forced, rule.mass)
