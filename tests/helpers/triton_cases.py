"""Random indexes and masks for the Triton tests: every form, ragged counts, every mask.

What these tests interpret takes 2 minutes of CPU time in one process of one thread (AMD EPYC,
Zen 4, Triton 3.7): `OMP_NUM_THREADS=1 pytest tests/lowering/triton --durations=15`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from mpass.lowering.index import (
    ALL_BLOCKS,
    ALL_DIAGONALS,
    AttentionMask,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    first_query_block,
    list_slots,
    num_key_blocks,
    num_query_blocks,
)

SLOTS = {
    "lists": list_slots(4),
    "diagonals": diagonal_slots(4),
    "mixed": (1, -1, -2, 0),
    "shared": (0, 0, -1, -1),
}
"""Forms of an index of four heads; shared: two heads of a kv head read one row."""


def random_index(
    slots: tuple[int, ...],
    mask: AttentionMask,
    *,
    batch: int,
    num_queries: int,
    num_keys: int,
    width: IndexWidth,
    seed: int = 0,
) -> SparseIndex:
    """An index with random counts and entries that keeps the format's promises.

    Diagonal block always selected (causal), ascending, no duplicates; every third diagonal head
    and the last row of every second list select all of them.
    """
    generator = torch.Generator().manual_seed(seed)
    rows = num_query_blocks(num_queries, mask.query_offset)
    first, blocks = first_query_block(mask.query_offset), num_key_blocks(num_keys)
    index = empty_index(torch.empty(batch, 0), rows, width, slots)

    def sample(size: int, most: int, forced: int | None = None) -> torch.Tensor:
        count = int(torch.randint(0, min(size, most) + 1, (), generator=generator))
        picked = torch.randperm(size, generator=generator)[:count].tolist()
        if forced is not None:
            picked = [*[entry for entry in picked if entry != forced][: most - 1], forced]
        return torch.tensor(sorted(picked), dtype=torch.int32)

    def fill(count: torch.Tensor, entries: torch.Tensor, values: torch.Tensor) -> None:
        count.fill_(len(values))
        entries[: len(values)] = values

    for b in range(batch):
        for head in range(index.block_count.shape[1]):
            for row in range(rows):
                if head % 2 and row == rows - 1:
                    index.block_count[b, head, row] = ALL_BLOCKS
                    continue
                size = min(first + row + 1, blocks) if mask.causal else blocks
                forced = first + row if mask.causal and first + row < blocks else None
                fill(
                    index.block_count[b, head, row],
                    index.block_index[b, head, row],
                    sample(size, width.max_blocks, forced),
                )
        for head in range(index.diagonal_count.shape[1]):
            if head % 3 == 2:
                index.diagonal_count[b, head] = ALL_DIAGONALS
                continue
            ahead = 0 if mask.causal else blocks - 1
            distances = sample(first + rows + ahead, width.max_diagonals, ahead) - ahead
            fill(index.diagonal_count[b, head], index.diagonal_index[b, head], distances)
        shared = {slot: sample(num_keys, width.max_columns) for slot in dict.fromkeys(slots)}
        for head, slot in enumerate(slots):
            fill(index.column_count[b, head], index.column_index[b, head], shared[slot])
    return index


def padding(batch: int, num_keys: int) -> torch.Tensor:
    """A key mask with padding on the left, on the right, and with a hole."""
    mask = torch.ones(batch, num_keys, dtype=torch.bool)
    mask[0, : num_keys // 3] = False
    if batch > 1:
        mask[1, num_keys - num_keys // 4 :] = False
        mask[1, 5] = False
    return mask


def assert_same(index: SparseIndex, expected: SparseIndex) -> None:
    """Both indexes are equal entry by entry, and in the format's dtype and layout."""
    assert index.head_slots == expected.head_slots
    for tensor, truth in zip(index.tensors(), expected.tensors(), strict=True):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
        assert torch.equal(tensor, truth)


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers: what a kernel forgets to write shows."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
