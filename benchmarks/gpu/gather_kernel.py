# ruff: noqa: ANN001, ANN201 - the arguments of a Triton kernel have no Python types
"""The vertical-slash kernel as MInference 1.0 describes it (section 3.2, appendix C).

Per query block a list of key blocks and a list of vertical columns. Every block is masked, the
columns are gathered inside of the loop, one program per query block of 64. The baseline that the
generated kernel must beat, in plain Triton.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from mpass.lowering.index import BLOCK, SparseIndex, num_query_blocks


@triton.jit
def attend_rows(
    query, key, value, out, block_count, block_index, column_count, column_index,
    stride_qh, stride_qn, stride_kh, stride_kn, stride_oh, stride_on,
    length, max_blocks, max_columns, group, scale,
    DIM: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, head = tl.program_id(0), tl.program_id(1)
    rows = row * BLOCK + tl.arange(0, BLOCK)
    dims = tl.arange(0, DIM)
    real = rows < length
    query += head.to(tl.int64) * stride_qh
    key += (head // group).to(tl.int64) * stride_kh
    value += (head // group).to(tl.int64) * stride_kh
    q = tl.load(
        query + rows[:, None].to(tl.int64) * stride_qn + dims[None, :],
        mask=real[:, None],
        other=0.0,
    )
    head_row = (head * tl.num_programs(0) + row).to(tl.int64)
    blocks = block_index + head_row * max_blocks
    columns = column_index + head_row * max_columns
    num_blocks = tl.load(block_count + head_row)
    num_columns = tl.load(column_count + head_row)
    largest = tl.full([BLOCK], -1.0e20, tl.float32)
    total = tl.full([BLOCK], 0.0, tl.float32)
    acc = tl.full([BLOCK, DIM], 0.0, tl.float32)
    for step in range(0, num_blocks):
        keys = tl.load(blocks + step) * BLOCK + tl.arange(0, BLOCK)
        inside = keys < length
        at = keys.to(tl.int64) * stride_kn
        k = tl.load(key + at[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        scores = tl.dot(q, k) * scale
        scores = tl.where(rows[:, None] >= keys[None, :], scores, -1.0e30)
        bound = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - bound[:, None])
        total = total * tl.exp2(largest - bound) + tl.sum(weights, 1)
        v = tl.load(value + at[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        acc = acc * tl.exp2(largest - bound)[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = bound
    for start in range(0, num_columns, BLOCK):
        places = start + tl.arange(0, BLOCK)
        inside = places < num_columns
        at = tl.load(columns + places, mask=inside, other=0).to(tl.int64) * stride_kn
        k = tl.load(key + at[None, :] + dims[:, None], mask=inside[None, :], other=0.0)
        scores = tl.where(inside[None, :], tl.dot(q, k) * scale, -1.0e30)
        bound = tl.maximum(largest, tl.max(scores, 1))
        weights = tl.exp2(scores - bound[:, None])
        total = total * tl.exp2(largest - bound) + tl.sum(weights, 1)
        v = tl.load(value + at[:, None] + dims[None, :], mask=inside[:, None], other=0.0)
        acc = acc * tl.exp2(largest - bound)[:, None] + tl.dot(weights.to(v.dtype), v)
        largest = bound
    out += head.to(tl.int64) * stride_oh
    tl.store(
        out + rows[:, None].to(tl.int64) * stride_on + dims[None, :],
        (acc / total[:, None]).to(out.dtype.element_ty),
        mask=real[:, None],
    )


def row_lists(index: SparseIndex, length: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Blocks and columns per query block from an index in diagonal form, batch size 1.

    Returns block counts [H, I], blocks [H, I, max_diagonals], column counts [H, I] and columns
    [H, I, max_columns]; columns that a block of the row covers are left out.
    """
    rows = torch.arange(num_query_blocks(length, 0), device=index.diagonal_index.device)[:, None]
    counts, columns = [], []
    block_counts, blocks = [], []
    for head in range(len(index.head_slots)):
        live = torch.arange(index.diagonal_index.shape[-1], device=rows.device)
        live = live < index.diagonal_count[0, head]
        distances = index.diagonal_index[0, head]
        block_counts.append((live & (distances <= rows)).sum(-1))
        blocks.append((rows - distances).clamp(min=0))
        table = torch.zeros(rows.shape[0] + 1, dtype=torch.bool, device=rows.device)
        table[torch.where(live & (distances < rows.shape[0]), distances.long(), -1)] = True
        table[-1] = False
        keys = index.column_index[0, head].long()
        kept = torch.arange(keys.shape[0], device=rows.device) < index.column_count[0, head]
        kept = kept & (keys < rows * BLOCK) & ~table[(rows - keys // BLOCK).clamp(min=-1)]
        order = torch.sort(kept.to(torch.uint8), dim=-1, descending=True, stable=True).indices
        counts.append(kept.sum(-1))
        columns.append(keys[order])
    stacked = (torch.stack(t).int().contiguous() for t in (block_counts, blocks, counts, columns))
    block_count, block_index, column_count, column_index = stacked
    return block_count, block_index, column_count, column_index


def gather_attention(
    query: Tensor, key: Tensor, value: Tensor, lists: tuple[Tensor, Tensor, Tensor, Tensor]
) -> Tensor:
    """Causal attention of [1, H, N, D] over the lists of `row_lists`."""
    _, heads, length, dim = query.shape
    out = torch.empty_like(query)
    assert key.stride() == value.stride()
    attend_rows[(num_query_blocks(length, 0), heads)](
        query, key, value, out, *lists,
        *query.stride()[1:3], *key.stride()[1:3], *out.stride()[1:3],
        length, lists[1].shape[-1], lists[3].shape[-1], heads // key.shape[1],
        dim**-0.5 * math.log2(math.e),
        DIM=dim, BLOCK=BLOCK, num_warps=4, num_stages=2,
    )  # fmt: skip
    return out
