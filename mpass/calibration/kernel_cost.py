"""What a pattern costs on this device: a linear model of the kernels, fitted to their run time.

seconds of a head = tiles * tile + columns * column + estimation, where a tile is 64 queries x 64
keys of a selected block and columns count 64 queries x 64 gathered keys. The first two factors are
timed once on the model's own operands, estimation once per pattern.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from mpass.calibration.instrument import AttentionOperands, attend_dense, attend_index
from mpass.lowering.device import no_wait
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.index import (
    ALL_BLOCKS,
    ALL_DIAGONALS,
    BLOCK,
    IndexWidth,
    SparseIndex,
    diagonal_slots,
    empty_index,
    first_query_block,
    num_query_blocks,
)

REPEATS = 3


@dataclass(frozen=True)
class KernelCost:
    """Seconds per tile, per tile of columns, and of a whole layer by dense attention."""

    tile: float
    column: float
    dense_layer: float

    def seconds(self, tiles: Tensor, columns: Tensor) -> Tensor:
        """Attention time of heads that do this much work."""
        return tiles * self.tile + columns * self.column

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def synchronize(device: torch.device) -> None:
    """Wait until the device has nothing left to do."""
    device_lowering(device).synchronize(device)


def read_clock(device: torch.device) -> float:
    """Seconds, when all work given to the device is done.

    One thread alone is charged its own CPU time: a busy machine does not count. More threads, or
    another device, are on the wall clock.
    """
    synchronize(device)
    waits = device_lowering(device).synchronize is not no_wait
    alone = not waits and torch.get_num_threads() == 1
    return time.thread_time() if alone else time.perf_counter()


def seconds_of(
    runs: Sequence[Callable[[], object]], device: torch.device, repeats: int = REPEATS
) -> list[float]:
    """The shortest of some runs of each, taken in turns: what other work adds is not negative."""
    best = [float("inf")] * len(runs)
    for _ in range(repeats):
        for number, run in enumerate(runs):
            start = read_clock(device)
            run()
            best[number] = min(best[number], read_clock(device) - start)
    return best


def fit_kernel(operands: AttentionOperands) -> KernelCost:
    """Time dense attention, the sparse kernel over all tiles, and over one diagonal and columns."""
    query, device = operands.query, operands.query.device
    heads, num_keys = operands.num_heads, operands.key.shape[2]
    rows = num_query_blocks(query.shape[2], operands.mask.query_offset)
    slots = diagonal_slots(heads)
    every = empty_index(query, rows, IndexWidth(), slots)
    every.diagonal_count.fill_(ALL_DIAGONALS)
    count = max(BLOCK, num_keys // 8 // BLOCK * BLOCK)
    some = empty_index(query, rows, IndexWidth(max_diagonals=1, max_columns=count), slots)
    some.diagonal_count.fill_(1)
    some.column_count.fill_(count)
    some.column_index.copy_(torch.arange(count, device=device))

    dense, whole, columns = seconds_of(
        [
            lambda: attend_dense(operands),
            lambda: attend_index(operands, every),
            lambda: attend_index(operands, some),
        ],
        device,
    )
    all_tiles = float(count_work(every, operands)[0].sum())
    few_tiles, gathered = (float(work.sum()) for work in count_work(some, operands))
    tile = whole / all_tiles
    return KernelCost(tile, max(tile, (columns - few_tiles * tile) / gathered), dense)


def count_work(index: SparseIndex, operands: AttentionOperands) -> tuple[Tensor, Tensor]:
    """Tiles and tiles of columns that each head computes: two fp64 [H], summed over the batch.

    Columns inside of selected blocks are counted too, and a window is not looked at: upper bounds.
    """
    mask, device = operands.mask, index.column_index.device
    first = first_query_block(mask.query_offset)
    last = first + num_query_blocks(operands.query.shape[2], mask.query_offset)
    causal = float(sum(row + 1 for row in range(first, last)))
    from_distance = (last - torch.arange(last + 1, device=device).clamp(min=first)).clamp(min=0)

    def looked_up(entries: Tensor, counts: Tensor) -> Tensor:
        live = torch.arange(entries.shape[-1], device=device) < counts[..., None]
        rows = from_distance[entries.long().clamp(max=last)]
        return torch.where(live, rows, 0).sum(-1).double().sum(0)

    whole = torch.arange(first + 1, last + 1, device=device)
    counts = torch.where(index.block_count == ALL_BLOCKS, whole, index.block_count)
    in_lists = counts.sum((0, 2)).double()
    on_diagonals = looked_up(index.diagonal_index, index.diagonal_count)
    every = (index.diagonal_count == ALL_DIAGONALS).sum(0).double() * causal
    on_diagonals = on_diagonals + every
    tiles = torch.stack(
        [in_lists[slot] if slot >= 0 else on_diagonals[-1 - slot] for slot in index.head_slots]
    )
    columns = looked_up(index.column_index // BLOCK + 1, index.column_count) / BLOCK
    return tiles.cpu(), columns.cpu()
