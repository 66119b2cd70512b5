"""Index estimators by generated C++; the meaning is that of their names in lowering.reference.

One call of a generated library per index, whatever the rules of its heads.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mpass.lowering.cpu.arguments import (
    EstimateArguments,
    list_arguments,
    pointer,
    rows_contiguous,
    rule_fields,
    strides,
)
from mpass.lowering.cpu.attention import bias_lines
from mpass.lowering.cpu.library import load_library
from mpass.lowering.cpu.support import estimate_spec
from mpass.lowering.distance_bias import antidiagonal_line, pair_line, run_line
from mpass.lowering.index import (
    BLOCK,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    list_slots,
)
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.reference.block_scores import BlockScoresRule, block_scores_width
from mpass.lowering.reference.block_sparse import BlockSparseRule, block_sparse_width
from mpass.lowering.reference.flex_prefill import FlexPrefillRule, flex_prefill_width
from mpass.lowering.reference.sample_attention import (
    SampleAttentionRule,
    column_rule,
    window_index,
)
from mpass.lowering.reference.union import VerticalBlockRule, vertical_block_width
from mpass.lowering.reference.vertical_slash import VerticalSlashRule, vertical_slash_width
from mpass.lowering.reference.x_attention import XAttentionRule, x_attention_width

GroupLine: TypeAlias = Callable[[Tensor, int, int, int], Tensor]
"""A line by groups, as `mpass.lowering.distance_bias.pair_line` makes it."""


def vertical_slash_index(inputs: EstimateInputs, rules: Sequence[VerticalSlashRule]) -> SparseIndex:
    """Columns and diagonals with the most attention of the last queries."""
    width, slots = vertical_slash_width(rules), diagonal_slots(len(inputs.heads))
    index = empty_index(inputs.query, inputs.num_blocks, width, slots)
    run_budgets(
        "vertical_slash_index",
        inputs,
        [rule.vertical_size for rule in rules],
        [rule.slash_size for rule in rules],
        (index.column_count, index.column_index, index.diagonal_count, index.diagonal_index),
        scale=inputs.scale,
        bias=bias_arguments(inputs),
    )
    return index


def block_sparse_index(inputs: EstimateInputs, rules: Sequence[BlockSparseRule]) -> SparseIndex:
    """The blocks of largest mean-pooled score, per query block."""
    index = empty_lists(inputs, block_sparse_width(rules))
    run_budgets(
        "block_top_k_index",
        inputs,
        [rule.top_k for rule in rules],
        [rule.block_size for rule in rules],
        (index.block_count, index.block_index, None, None),
        scale=1.0 if inputs.distance_bias is None else inputs.scale,
        bias=bias_arguments(
            inputs, lines_of_groups(inputs, [rule.block_size for rule in rules], pair_line)
        ),
    )
    return index


def vertical_block_index(inputs: EstimateInputs, rules: Sequence[VerticalBlockRule]) -> SparseIndex:
    """Blocks by estimated attention, and vertical columns by that of the last queries.

    Raises MemoryError if the pooled keys do not fit.
    """
    index = empty_lists(inputs, vertical_block_width(rules))
    lines = lines_of_runs(inputs, [rule.pool for rule in rules])
    run_lists("union", index, inputs, rules, bias_arguments(inputs, lines))
    return index


def block_scores_index(inputs: EstimateInputs, rules: Sequence[BlockScoresRule]) -> SparseIndex:
    """Blocks by the exponentials of whole query tiles."""
    index = empty_lists(inputs, block_scores_width(rules))
    lines = lines_of_runs(inputs, [rule.block_size for rule in rules])
    run_lists("block_scores", index, inputs, rules, bias_arguments(inputs, lines))
    return index


def x_attention_index(inputs: EstimateInputs, rules: Sequence[XAttentionRule]) -> SparseIndex:
    """Blocks by sums along antidiagonals."""
    index = empty_lists(inputs, x_attention_width(rules))
    lines = lines_of_groups(inputs, [rule.stride for rule in rules], antidiagonal_line)
    run_lists("x_attention", index, inputs, rules, bias_arguments(inputs, lines))
    return index


def flex_prefill_index(inputs: EstimateInputs, rules: Sequence[FlexPrefillRule]) -> SparseIndex:
    """Adaptive vertical-slash in blocks, or pooled blocks where those are good."""
    index = empty_lists(inputs, flex_prefill_width(rules))
    lines = lines_of_groups(inputs, [rule.block_size for rule in rules], pair_line)
    run_lists("flex_prefill", index, inputs, rules, bias_arguments(inputs, lines))
    return index


def sample_attention_index(
    inputs: EstimateInputs, rules: Sequence[SampleAttentionRule]
) -> SparseIndex:
    """A local window, and columns that hold a share of the sampled rows' attention."""
    index = window_index(inputs, rules)
    columns = [column_rule(rule, inputs.num_queries) for rule in rules]
    run_lists("sample_attention", index, inputs, columns, bias_arguments(inputs))
    return index


@dataclass(frozen=True, slots=True, eq=False)
class BiasArguments:
    """What a kernel takes of a bias by distance, and the tensors whose memory that is."""

    fields: dict[str, int | None]
    kept: tuple[Tensor, ...] = ()


def bias_arguments(inputs: EstimateInputs, runs: Sequence[Tensor] = ()) -> BiasArguments:
    """The bias of each head, and what it is of runs of keys, one line [L] per head.

    Lines of groups are symmetric about their middle, which they keep; lines of runs are of one
    length.
    """
    lines = [line for line in inputs.bias_lines() if line is not None]
    if not lines:
        return BiasArguments({"distance_bias": None, "run_bias": None})
    bias = bias_lines(torch.stack(lines))
    fields = {"distance_bias": pointer(bias), "run_bias": None, "bias_head": bias.shape[1]}
    if not runs:
        return BiasArguments(fields, (bias,))
    most = max(line.shape[0] for line in runs)
    pads = [(most - line.shape[0]) // 2 for line in runs]
    joined = torch.stack(
        [torch.nn.functional.pad(line, (n, n)) for line, n in zip(runs, pads, strict=True)]
    ).contiguous()
    fields |= {"run_bias": pointer(joined), "run_head": joined.shape[1]}
    return BiasArguments(fields, (bias, joined))


def lines_of_runs(inputs: EstimateInputs, lengths: Sequence[int]) -> list[Tensor]:
    """What the bias of each head is of runs of so many keys, with a block of zeros after it."""
    return [
        torch.nn.functional.pad(run_line(line, length), (0, BLOCK))
        for line, length in zip(inputs.bias_lines(), lengths, strict=True)
        if line is not None
    ]


def lines_of_groups(
    inputs: EstimateInputs, lengths: Sequence[int], function: GroupLine
) -> list[Tensor]:
    """What the bias of each head is of groups of so many queries and keys; [2 G - 1] for G."""
    origin = inputs.mask.query_offset + inputs.num_queries - 1
    end = max(inputs.num_keys, origin + 1)
    return [
        function(line, origin, length, -(-end // length) + BLOCK)
        for line, length in zip(inputs.bias_lines(), lengths, strict=True)
        if line is not None
    ]


def empty_lists(inputs: EstimateInputs, width: IndexWidth) -> SparseIndex:
    """An index in list form that an estimator is to fill."""
    return empty_index(inputs.query, inputs.num_blocks, width, list_slots(len(inputs.heads)))


def is_empty(inputs: EstimateInputs) -> bool:
    """Whether there is nothing to look at."""
    return 0 in (inputs.batch, len(inputs.heads), inputs.num_queries, inputs.num_keys)


def run_budgets(
    name: str,
    inputs: EstimateInputs,
    first_sizes: Sequence[int],
    second_sizes: Sequence[int],
    outputs: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    *,
    scale: float,
    bias: BiasArguments,
) -> None:
    """Call an estimator of fixed budgets, which fills `outputs` (see EstimateArguments)."""
    if is_empty(inputs):
        return
    numbers = torch.tensor(
        [list(inputs.heads), list(first_sizes), list(second_sizes)],
        dtype=torch.int32,
        device="cpu",
    )
    first_count, first_index, second_count, second_index = outputs
    query, key, key_mask = readable(inputs)
    arguments = EstimateArguments(
        **common_arguments(inputs, query, key, key_mask),
        heads=pointer(numbers[0]),
        first_sizes=pointer(numbers[1]),
        second_sizes=pointer(numbers[2]),
        first_count=pointer(first_count),
        first_index=pointer(first_index),
        second_count=pointer(second_count),
        second_index=pointer(second_index),
        kv_heads=key.shape[1],
        first_width=first_index.shape[-1],
        second_width=0 if second_index is None else second_index.shape[-1],
        scale=scale,
        **bias.fields,
    )
    spec = replace(estimate_spec(query), biased=inputs.distance_bias is not None)
    if load_library(spec)[name](ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory to estimate an index over keys {tuple(key.shape)}")


def run_lists(
    kernel: str,
    index: SparseIndex,
    inputs: EstimateInputs,
    rules: Sequence[Any],
    bias: BiasArguments,
) -> None:
    """Fill the lists and columns of an index by the kernel of that name, one rule per head."""
    if is_empty(inputs):
        return
    parameters = {
        name: torch.tensor(
            [getattr(rule, name) or 0 for rule in rules],
            dtype=torch.float32 if kind == "float" else torch.int32,
            device="cpu",
        )
        for name, kind in rule_fields(kernel).items()
    }
    parameters["heads"] = torch.tensor(list(inputs.heads), dtype=torch.int32, device="cpu")
    query, key, key_mask = readable(inputs)
    arguments = list_arguments(kernel)(
        **common_arguments(inputs, query, key, key_mask),
        block_count=pointer(index.block_count),
        block_index=pointer(index.block_index),
        column_count=pointer(index.column_count),
        column_index=pointer(index.column_index),
        list_width=index.block_index.shape[-1],
        column_width=index.column_index.shape[-1],
        scale=inputs.scale,
        **bias.fields,
        **{name: pointer(values) for name, values in parameters.items()},
    )
    biased = inputs.distance_bias is not None
    library = load_library(replace(estimate_spec(query), kernel=kernel, biased=biased))
    if library[f"{kernel}_index"](ctypes.byref(arguments)) != 0:
        raise MemoryError(f"no memory to estimate an index over keys {tuple(key.shape)}")


def readable(inputs: EstimateInputs) -> tuple[Tensor, Tensor, Tensor | None]:
    """Query and key with contiguous rows, and the key mask as bytes, as the kernels read them."""
    query, key = rows_contiguous(inputs.query), rows_contiguous(inputs.key)
    mask = inputs.mask.key_mask
    return query, key, None if mask is None else mask.contiguous().view(torch.uint8)


def common_arguments(
    inputs: EstimateInputs, query: Tensor, key: Tensor, key_mask: Tensor | None
) -> dict[str, Any]:
    """What every estimator takes; the tensors are those of `readable`, which the caller keeps."""
    return {
        "query": pointer(query),
        "key": pointer(key),
        "key_mask": pointer(key_mask),
        "batch": inputs.batch,
        "num_heads": len(inputs.heads),
        "group": inputs.group,
        "num_queries": inputs.num_queries,
        "num_keys": inputs.num_keys,
        "num_blocks": inputs.num_blocks,
        "query_offset": inputs.mask.query_offset,
        "window": inputs.mask.window,
        "causal": inputs.mask.causal,
        "threads": torch.get_num_threads(),
        **strides("query", query),
        **strides("key", key),
    }
