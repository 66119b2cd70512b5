"""The lists of an index turned round: which query blocks read each key block.

Built on the device in time and memory of the index, but for a bit per pair of blocks of some lists
at a time. Letters: B batch, L lists, H query heads, I query blocks, J key blocks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.index import (
    SparseIndex,
    first_query_block,
    num_key_blocks,
    num_query_blocks,
)
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.attention import row_form
from mpass.lowering.triton.launch import device_ints, launch, target_for
from mpass.lowering.triton.spec import TritonKernelSpec

BITS_BYTES = 1 << 28
"""Memory of a bit per pair of blocks; lists are turned as many at a time as fit, at least one."""


@dataclass(frozen=True, slots=True, eq=False)
class Turned:
    """Which query blocks read each key block.

    readers: int32 [B, L, I * (max_blocks + 1)], positions of query blocks on the absolute grid, of
    key block after key block, ascending; then those that read every block. spans: int32
    [B, H, J, 10], see templates/key_gradients.py.jinja.
    """

    readers: Tensor
    spans: Tensor


def turn_lists(inputs: AttentionInputs, index: SparseIndex) -> Turned:
    """The index by key blocks, in three launches, or more where lists are turned in turns."""
    query, mask = inputs.query, inputs.mask
    batch, heads, num_queries, _ = query.shape
    num_rows = num_query_blocks(num_queries, mask.query_offset)
    num_blocks = num_key_blocks(inputs.key.shape[2])
    first_row = first_query_block(mask.query_offset)
    num_lists, max_blocks = index.block_index.shape[1], index.block_index.shape[-1]
    num_words = -(-num_rows // 32)
    device, form = query.device, row_form(index.head_slots)
    spec = TritonKernelSpec(
        template="turned",
        form=form,
        causal=mask.causal,
        window=mask.window > 0,
        num_warps=1,
        target=target_for(device),
    )
    turned_size = num_rows * (max_blocks + 1)
    readers = torch.empty(batch, num_lists, turned_size, dtype=torch.int32, device=device)
    counts = readers.new_zeros(batch, num_lists, num_blocks + 1)
    stops = torch.empty_like(counts)
    list_bytes = 4 * batch * (num_blocks + 1) * num_words
    at_once = max(1, BITS_BYTES // max(1, list_bytes))
    for first_list in range(0, num_lists, at_once):
        lists = min(at_once, num_lists - first_list)
        part = slice(first_list, first_list + lists)
        bits = readers.new_zeros(batch, lists, num_blocks + 1, num_words)
        named = {"first_list": first_list, "num_lists": num_lists, "num_words": num_words}
        launch(
            spec,
            "mark_readers",
            (num_rows, lists, batch),
            bits=bits,
            reader_count=counts,
            block_count=index.block_count.contiguous(),
            block_index=index.block_index.contiguous(),
            num_blocks=num_blocks,
            max_blocks=max_blocks,
            **named,
        )
        stops[:, part] = counts[:, part].cumsum(-1, dtype=torch.int32)
        launch(
            spec,
            "list_readers",
            (num_blocks + 1, lists, batch),
            readers=readers,
            reader_stop=stops,
            reader_count=counts,
            bits=bits,
            first_row=first_row,
            turned_size=turned_size,
            **named,
        )
    spans = readers.new_empty(batch, heads, num_blocks, 10)
    max_diagonals = index.diagonal_index.shape[-1]
    launch(
        spec,
        "plan_keys",
        (num_blocks, heads, batch),
        spans=spans,
        readers=readers,
        reader_stop=stops,
        reader_count=counts,
        diagonal_count=index.diagonal_count.contiguous(),
        diagonal_index=index.diagonal_index.contiguous(),
        slots=device_ints(index.head_slots, device) if form == "mixed" else spans,
        num_rows=num_rows,
        first_row=first_row,
        num_heads=heads,
        window=mask.window,
        num_lists=num_lists,
        max_diagonals=max_diagonals,
        num_diagonals=index.diagonal_index.shape[1],
        turned_size=turned_size,
        search_steps=max(num_rows, max_diagonals).bit_length(),
    )
    return Turned(readers, spans)
