"""Calls of flex_attention that stay dense: each is the line `# here` of its program."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

N = 192


def flex_scaled(q, k, v):
    return flex_attention(q, q, q, scale=q.shape[2] ** -0.5)  # here


def flex_biased(q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + (j - i))  # here


def flex_with_sums(q, k, v):
    return flex_attention(q, k, v, return_lse=True)  # here


def seen(b, h, i, j):
    return i >= j


def blocks_of(length: int) -> BlockMask:
    return create_block_mask(seen, None, None, length, length, device="cpu")


def flex_with(block_mask: BlockMask) -> Callable[..., Any]:
    def program(q, k, v):
        return flex_attention(q, k, v, block_mask=block_mask)  # here

    return program


def other_blocks() -> BlockMask:
    blocks = blocks_of(N)
    return BlockMask.from_kv_blocks(
        torch.ones_like(blocks.kv_num_blocks), blocks.kv_indices, mask_mod=seen, seq_lengths=(N, N)
    )


def everything(b, h, i, j):
    return torch.ones_like(i, dtype=torch.bool)


def half_the_keys(b, h, i, j):
    return (j < N // 2) & (i >= 0)


def flex_made_inside(q, k, v):
    blocks = create_block_mask(seen, None, None, N, N, device="cpu")
    return flex_attention(q, k, v, block_mask=blocks)  # here
