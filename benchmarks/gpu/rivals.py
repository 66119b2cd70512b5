"""What sparse attention is measured against: SDPA and FlexAttention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from mpass.lowering.index import BLOCK, SparseIndex

BACKENDS: dict[str, SDPBackend | None] = {
    "sdpa": None,
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
}
"""Dense attention of torch, by its own choice and by each backend that is worth it."""

FLEX_LIMIT = 131072
"""Beyond this FlexAttention's block mask, an entry per pair of blocks, outgrows the memory."""


def sdpa(query: Tensor, key: Tensor, value: Tensor, backend: SDPBackend | None) -> Tensor:
    """torch's own dense causal attention, by one backend or by its own choice."""
    attend = functools.partial(
        torch.nn.functional.scaled_dot_product_attention,
        query,
        key,
        value,
        is_causal=True,
        enable_gqa=True,
    )
    if backend is None:
        return attend()
    with sdpa_kernel(backend):
        return attend()


def flex(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    index: SparseIndex,
    *,
    compiled: bool,
    block: int = BLOCK,
) -> Callable[[], Tensor]:
    """FlexAttention over the same lists of blocks; index in list form, one list per head.

    block: queries and keys of an entry of the index.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    def causal(b: Any, h: Any, q: Any, k: Any) -> Any:
        return q >= k

    rows = -(-query.shape[2] // block)
    own = torch.arange(rows, device=query.device, dtype=torch.int32)
    entries = torch.nn.functional.pad(
        index.block_index, (0, max(0, rows - index.block_index.shape[-1]))
    )[..., :rows].contiguous()
    # The block of the row itself is its last entry: cut by the mask, all before it are whole.
    mask = BlockMask.from_kv_blocks(
        kv_num_blocks=torch.ones_like(index.block_count),
        kv_indices=own.view(1, 1, rows, 1).expand(*index.block_count.shape, rows).contiguous(),
        full_kv_num_blocks=index.block_count - 1,
        full_kv_indices=entries,
        BLOCK_SIZE=block,
        mask_mod=causal,
        seq_lengths=(query.shape[2], key.shape[2]),
    )
    attend = torch.compile(flex_attention) if compiled else flex_attention
    # Its own tiles must divide the mask's blocks; the default ones are larger.
    tiles = {"BLOCK_M": block, "BLOCK_N": BLOCK} if compiled else None
    return lambda: attend(query, key, value, block_mask=mask, enable_gqa=True, kernel_options=tiles)
