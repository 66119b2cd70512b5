"""What the sparse ops mean, in plain torch: the truth that generated kernels are tested against.

Nothing here builds an Nq x Nk tensor: queries are taken a chunk of blocks at a time.
Letters: B batch, H query heads, Hk key/value heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import (
    ALL_BLOCKS,
    ALL_DIAGONALS,
    BLOCK,
    AttentionMask,
    SparseIndex,
    first_query_block,
    num_key_blocks,
)
from mpass.lowering.inputs import AttentionInputs

CHUNK_BLOCKS = 8
"""Query blocks computed at a time: the largest temporary is [B, H, CHUNK_BLOCKS * BLOCK, Nk]."""


def sparse_attention(inputs: AttentionInputs, index: SparseIndex) -> Tensor:
    """Exact softmax attention over the keys that `index` selects and the mask allows.

    The result is [B, H, Nq, Dv] in the query's dtype. A row with nothing to see gives zeros. It is
    computed in fp32, of fp64 inputs in fp64.
    """
    return attend_rows(inputs, index, None)


def sparse_attention_lse(inputs: AttentionInputs, index: SparseIndex) -> tuple[Tensor, Tensor]:
    """`sparse_attention`, and the log-sum-exp of each row's scores.

    The latter is [B, H, Nq] in fp32 (of fp64 inputs in fp64), the natural logarithm of the sum over
    the keys that the row sees of e^score, scaled and capped, and of e^sink where there are sinks. A
    row with nothing to see has minus infinity, or its sink.
    """
    lse = empty_lse(inputs.query)
    return attend_rows(inputs, index, lse), lse


def attend_rows(inputs: AttentionInputs, index: SparseIndex, lse: Tensor | None) -> Tensor:
    """`sparse_attention`, which also fills `lse` [B, H, Nq] if there is one."""
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    out = empty_output(query, value)
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    keys = repeat_kv(key, heads).to(wide)
    values = repeat_kv(value, heads).to(wide)
    for rows in query_chunks(num_queries, mask.query_offset):
        visible = visible_rows(index, mask, rows, batch=batch, num_keys=num_keys)
        scores = query[:, :, rows].to(wide) @ keys.transpose(-1, -2) * inputs.scale
        if inputs.distance_bias is not None:
            own = torch.arange(rows.start, rows.stop, device=query.device)
            scores += bias_rows(inputs.distance_bias.to(wide), own, num_queries, 0, num_keys)
        if inputs.softcap > 0:
            scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
        weights = masked_softmax(scores, visible, inputs.sink_logits)
        out[:, :, rows] = (weights @ values).to(out.dtype)
        if lse is not None:
            lse[:, :, rows] = masked_lse(scores, visible, inputs.sink_logits)
    return out


def masked_softmax(scores: Tensor, visible: Tensor, sink_logits: Tensor | None = None) -> Tensor:
    """Softmax over the visible keys; rows that see nothing are zero. NaN stays NaN."""
    scores = scores.masked_fill(~visible, -torch.inf)
    if sink_logits is not None:
        column = sink_logits.to(scores.dtype).view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        return torch.softmax(torch.cat([scores, column], dim=-1), dim=-1)[..., :-1]
    weights = torch.softmax(scores, dim=-1)
    return weights.masked_fill(~visible.any(-1, keepdim=True), 0.0)


def masked_lse(scores: Tensor, visible: Tensor, sink_logits: Tensor | None = None) -> Tensor:
    """Log-sum-exp over the visible keys and the sink; minus infinity where there is neither."""
    lse = torch.logsumexp(scores.masked_fill(~visible, -torch.inf), dim=-1)
    if sink_logits is None:
        return lse
    return torch.logaddexp(lse, sink_logits.to(lse.dtype).view(1, -1, 1))


def estimated_softmax(scores: Tensor, visible: Tensor) -> Tensor:
    """`masked_softmax` for estimates: a row that is no number counts for nothing."""
    return masked_softmax(scores, visible).nan_to_num(0.0)


def query_chunks(num_queries: int, query_offset: int) -> Iterator[slice]:
    """Slices of query rows whose bounds lie on the block grid of absolute positions."""
    start = 0
    while start < num_queries:
        block = (query_offset + start) // BLOCK
        stop = min(num_queries, (block + CHUNK_BLOCKS) * BLOCK - query_offset)
        yield slice(start, stop)
        start = stop


def visible_rows(
    index: SparseIndex, mask: AttentionMask, rows: slice, *, batch: int, num_keys: int
) -> Tensor:
    """The cells that are computed for some query rows: bool [B, H, rows, Nk].

    `rows` must lie on the block grid (see `query_chunks`). This is the meaning of the format.
    """
    device = index.column_index.device
    first = first_query_block(mask.query_offset)
    begin, end = mask.query_offset + rows.start, mask.query_offset + rows.stop
    positions = torch.arange(begin, end, device=device)
    row_blocks = positions // BLOCK
    low, stop = begin // BLOCK, (end - 1) // BLOCK + 1
    blocks = torch.arange(low, stop, device=device)
    selected = selected_blocks(index, blocks - first, blocks, num_key_blocks(num_keys), stop=stop)
    columns = selected_columns(index, batch, num_keys)

    keys = torch.arange(num_keys, device=device)
    local = row_blocks - low
    in_blocks = selected[:, :, local][..., keys // BLOCK]
    before = keys[None, :] < (row_blocks * BLOCK)[:, None]
    in_columns = columns[:, :, None, :] & (before if mask.causal else torch.ones_like(before))
    return (in_blocks | in_columns) & allowed_cells(mask, positions, num_keys)


def allowed_cells(mask: AttentionMask, positions: Tensor, num_keys: int) -> Tensor:
    """What the attention mask alone allows: bool, broadcastable to [B, H, rows, Nk].

    positions: absolute positions of the query rows.
    """
    keys = torch.arange(num_keys, device=positions.device)
    distance = positions[:, None] - keys[None, :]
    allowed = torch.ones_like(distance, dtype=torch.bool)
    if mask.causal:
        allowed &= distance >= 0
    if mask.window > 0:
        allowed &= distance < mask.window
        if not mask.causal:
            allowed &= distance > -mask.window
    allowed = allowed[None, None]
    if mask.key_mask is not None:
        allowed = allowed & mask.key_mask[:, None, None, :]
    return allowed


def selected_blocks(
    index: SparseIndex, rows: Tensor, blocks: Tensor, num_blocks: int, *, stop: int
) -> Tensor:
    """Key blocks that the query blocks select: bool [B, H, rows, num_blocks].

    Every one, also those that a mask will hide, where an index says so in one word.
    rows: rows of the lists; blocks: the same query blocks on the absolute grid, all before `stop`.
    """
    device = blocks.device
    per_head = []
    for slot in index.head_slots:
        if slot >= 0:
            counts = index.block_count[:, slot, rows]
            entries = index.block_index[:, slot, rows].long()
            table = torch.zeros(*counts.shape, num_blocks + 1, dtype=torch.bool, device=device)
            live = torch.arange(entries.shape[-1], device=device) < counts[..., None]
            table.scatter_(-1, torch.where(live, entries, num_blocks), True)
            table |= (counts == ALL_BLOCKS)[..., None]
            per_head.append(table[..., :num_blocks])
            continue
        counts = index.diagonal_count[:, -1 - slot]
        entries = index.diagonal_index[:, -1 - slot].long()
        # Distances -num_blocks .. size - 1, those of blocks ahead first.
        size = max(num_blocks, stop)
        table = torch.zeros(counts.shape[0], num_blocks + size + 1, dtype=torch.bool, device=device)
        live = torch.arange(entries.shape[-1], device=device) < counts[:, None]
        live &= (entries < size) & (entries >= -num_blocks)
        table.scatter_(-1, torch.where(live, entries, size) + num_blocks, True)
        table |= (counts == ALL_DIAGONALS)[:, None]
        distance = blocks[:, None] - torch.arange(num_blocks, device=device)[None, :]
        per_head.append(table[:, distance + num_blocks])
    return torch.stack(per_head, dim=1)


def selected_columns(index: SparseIndex, batch: int, num_keys: int) -> Tensor:
    """Vertical columns (single keys) that the heads select: bool [B, H, Nk]."""
    entries = index.column_index.long()
    live = torch.arange(entries.shape[-1], device=entries.device) < index.column_count[..., None]
    table = torch.zeros(
        batch, entries.shape[1], num_keys + 1, dtype=torch.bool, device=entries.device
    )
    table.scatter_(-1, torch.where(live, entries, num_keys), True)
    return table[..., :num_keys]


def computed_mask(
    index: SparseIndex, mask: AttentionMask, *, batch: int, num_queries: int, num_keys: int
) -> Tensor:
    """All cells that are computed: bool [B, H, Nq, Nk]. Small N only: it is an N x N tensor."""
    chunks = [
        visible_rows(index, mask, rows, batch=batch, num_keys=num_keys)
        for rows in query_chunks(num_queries, mask.query_offset)
    ]
    return torch.cat(chunks, dim=2)


def density(
    index: SparseIndex, mask: AttentionMask, *, batch: int, num_queries: int, num_keys: int
) -> Tensor:
    """Share of the mask's cells that are computed, per batch row and head: fp64 [B, H].

    Counted a chunk of query blocks at a time; exact. A batch row without any cell has density 0.
    """
    heads = len(index.head_slots)
    device = index.column_index.device
    computed = torch.zeros(batch, heads, dtype=torch.int64, device=device)
    total = torch.zeros(batch, 1, dtype=torch.int64, device=device)
    for rows in query_chunks(num_queries, mask.query_offset):
        positions = torch.arange(rows.start, rows.stop, device=device) + mask.query_offset
        computed += visible_rows(index, mask, rows, batch=batch, num_keys=num_keys).sum((2, 3))
        total += allowed_cells(mask, positions, num_keys).expand(batch, -1, -1, -1).sum((2, 3))
    return computed.double() / total.clamp(min=1).double()


def empty_output(query: Tensor, value: Tensor) -> Tensor:
    """[B, H, Nq, Dv] laid out as [B, Nq, H, Dv]: the layout that the output projection reads."""
    batch, heads, num_queries, _ = query.shape
    return query.new_empty(batch, num_queries, heads, value.shape[-1]).transpose(1, 2)


def empty_lse(query: Tensor) -> Tensor:
    """[B, H, Nq] in fp32, of an fp64 query in fp64: where log-sum-exps go."""
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape[:3], dtype=wide)


def repeat_kv(tensor: Tensor, heads: int) -> Tensor:
    """[B, Hk, N, D] -> [B, H, N, D], each kv head repeated for its group of query heads."""
    return tensor.repeat_interleave(heads // tensor.shape[1], dim=1)


__all__ = [
    "allowed_cells",
    "computed_mask",
    "density",
    "empty_lse",
    "empty_output",
    "estimated_softmax",
    "masked_lse",
    "masked_softmax",
    "query_chunks",
    "repeat_kv",
    "selected_blocks",
    "selected_columns",
    "sparse_attention",
    "sparse_attention_lse",
    "visible_rows",
]
