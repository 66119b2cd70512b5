"""flex_attention's lists of blocks against what its mask means.

A BlockMask holds a mask_mod and, apart from it, lists of the key blocks that each block of queries
visits: partial ones, whose cells mask_mod decides, and full ones, whose cells are all visible.
`create_block_mask` makes the lists from the mask_mod; anyone may make others, and then the kernel
computes what the lists say. Here both are compared, block by block and without a tensor of cells,
and where they differ attention is computed as listed.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim;
Bm, Hm: those of the lists (1 or B, 1 or H); R blocks of queries, C blocks of keys.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.index import AttentionMask
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import allowed_cells, repeat_kv

CHUNK = 256
"""Queries computed at a time: the largest temporary is [B, H, CHUNK, Nk]."""


@dataclass(frozen=True, slots=True, eq=False)
class BlockLists:
    """The lists of a BlockMask: of row r the first `kv_num_blocks[.., r]` entries are visited.

    kv_num_blocks [Bm, Hm, R] and kv_indices [Bm, Hm, R, *]: partial blocks; full_*: full ones, or
    None; query_block, key_block: tokens in a block of queries and of keys.
    """

    kv_num_blocks: Tensor
    kv_indices: Tensor
    full_kv_num_blocks: Tensor | None
    full_kv_indices: Tensor | None
    query_block: int
    key_block: int


def lists_agree(lists: BlockLists, mask: AttentionMask, num_queries: int, num_keys: int) -> Tensor:
    """Whether the lists make attention compute exactly the cells of `mask`: bool [].

    So they do if each block with a visible cell is listed once, and each full block is visible in
    all of its cells. Listing a block without visible cells as partial changes nothing.
    """
    partial, full = visits(lists, num_queries, num_keys)
    some, every = visible_blocks(lists, mask, num_queries, num_keys)
    return (~some | (partial + full == 1)).all() & (every | (full == 0)).all()


def visits(lists: BlockLists, num_queries: int, num_keys: int) -> tuple[Tensor, Tensor]:
    """How often each block is listed as partial and as full: int64 [Bm, Hm, R, C] each."""
    rows, columns = -(-num_queries // lists.query_block), -(-num_keys // lists.key_block)
    partial = count_entries(lists.kv_num_blocks, lists.kv_indices, rows, columns)
    if lists.full_kv_num_blocks is None or lists.full_kv_indices is None:
        return partial, torch.zeros_like(partial)
    return partial, count_entries(lists.full_kv_num_blocks, lists.full_kv_indices, rows, columns)


def count_entries(counts: Tensor, entries: Tensor, rows: int, columns: int) -> Tensor:
    """How often each of `columns` stands among the first `counts` entries: int64 [Bm, Hm, R, C]."""
    counts, entries = counts[:, :, :rows], entries[:, :, :rows].long()
    listed = torch.arange(entries.shape[-1], device=entries.device) < counts[..., None]
    listed &= (entries >= 0) & (entries < columns)
    found = entries.new_zeros(*entries.shape[:2], rows, columns + 1)
    entries = torch.where(listed, entries, columns)
    found[:, :, : entries.shape[2]].scatter_add_(-1, entries, torch.ones_like(entries))
    return found[..., :columns]


def visible_blocks(
    lists: BlockLists, mask: AttentionMask, num_queries: int, num_keys: int
) -> tuple[Tensor, Tensor]:
    """Blocks with some visible cell, and those with no hidden one: bool [B or 1, 1, R, C] each."""
    device, query_block, key_block = lists.kv_indices.device, lists.query_block, lists.key_block
    rows = torch.arange(-(-num_queries // query_block), device=device)[:, None]
    first = rows * query_block + mask.query_offset
    last = (first + query_block).clamp(max=num_queries + mask.query_offset) - 1
    columns = torch.arange(-(-num_keys // key_block), device=device)
    start = columns * key_block
    stop = (start + key_block).clamp(max=num_keys)
    # The keys that some query of the rows sees are contiguous, as each query sees a range of keys
    # and the next query's range begins and ends at most one later.
    low, high = start.expand(len(rows), -1), stop.expand(len(rows), -1)
    every = torch.ones_like(low, dtype=torch.bool)
    if mask.causal:
        high = torch.minimum(high, last + 1)
        every &= stop - 1 <= first
    if mask.window > 0:
        low = torch.maximum(low, first - mask.window + 1)
        every &= start > last - mask.window
        if not mask.causal:
            high = torch.minimum(high, last + mask.window)
            every &= stop - 1 < first + mask.window
    some = low < high
    if mask.key_mask is None:
        return some[None, None], every[None, None]
    valid = torch.nn.functional.pad(mask.key_mask.long().cumsum(-1), (1, 0))
    low, high = low.clamp(max=num_keys), torch.maximum(low, high).clamp(max=num_keys)
    some = some & (valid[:, high] > valid[:, low])
    every = every & (valid[:, stop] - valid[:, start] == stop - start)[:, None]
    return some[:, None], every[:, None]


def attend_as_listed(out: Tensor, inputs: AttentionInputs, lists: BlockLists) -> None:
    """Attention over the listed blocks, written to `out` [B, H, Nq, Dv].

    Cells of a partial block count where the mask allows them, those of a full block always, and
    those of a block that is listed twice count twice, as in torch's flex_attention kernels. Rows
    that see nothing give zeros.
    """
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    scale, softcap = inputs.scale, inputs.softcap
    num_queries, num_keys = query.shape[2], key.shape[2]
    partial, full = visits(lists, num_queries, num_keys)
    keys, values = (repeat_kv(tensor, query.shape[1]).float() for tensor in (key, value))
    columns = torch.arange(num_keys, device=query.device) // lists.key_block
    for start in range(0, num_queries, CHUNK):
        stop = min(num_queries, start + CHUNK)
        tokens = torch.arange(start, stop, device=query.device)
        in_partial, in_full = (
            count[:, :, tokens // lists.query_block][..., columns] for count in (partial, full)
        )
        allowed = allowed_cells(mask, tokens + mask.query_offset, num_keys)
        weight = (in_partial * allowed + in_full).float()
        scores = query[:, :, start:stop].float() @ keys.mT * scale
        if softcap > 0:
            scores = softcap * torch.tanh(scores / softcap)
        weights = torch.softmax(scores + weight.log(), -1)
        weights = weights.masked_fill(~(weight > 0).any(-1, keepdim=True), 0.0)
        out[:, :, start:stop] = (weights @ values).to(out.dtype)


def correct_as_listed(out: Tensor, inputs: AttentionInputs, lists: BlockLists) -> None:
    """Overwrite `out` [B, H, Nq, Dv] by what the lists say where they do not agree with the mask.

    For a device whose host would wait for the answer: both are computed, and the device chooses.
    """
    agree = lists_agree(lists, inputs.mask, inputs.query.shape[2], inputs.key.shape[2])
    listed = torch.empty_like(out)
    attend_as_listed(listed, inputs, lists)
    out.copy_(torch.where(agree, out, listed))


def warn_of_lists(layer: int) -> None:
    """Tell why a layer became slower than it need be; Python shows it once per layer."""
    place = f"layer {layer}" if layer >= 0 else "an attention"
    warnings.warn(
        f"flex_attention in {place}: the blocks that its BlockMask lists are not those of its "
        "mask_mod, so it was computed as listed, densely and slowly. Make the BlockMask with "
        "create_block_mask from the same mask_mod, or compile this module with "
        'backend="inductor".',
        RuntimeWarning,
        stacklevel=2,
    )
