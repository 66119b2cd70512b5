"""Generated C++ for x86-64 CPUs: KernelSpec -> source -> compiled library -> call."""

from mpass.lowering.cpu.attention import sparse_attention
from mpass.lowering.cpu.budget_estimators import block_top_k_index, vertical_slash_index
from mpass.lowering.cpu.dense import dense_attention, estimation_pays, highest_density
from mpass.lowering.cpu.estimators import (
    antidiagonal_index,
    flex_index,
    sampled_index,
    tile_index,
    union_index,
)
from mpass.lowering.cpu.support import unsupported

__all__ = [
    "antidiagonal_index",
    "block_top_k_index",
    "dense_attention",
    "estimation_pays",
    "flex_index",
    "highest_density",
    "sampled_index",
    "sparse_attention",
    "tile_index",
    "union_index",
    "unsupported",
    "vertical_slash_index",
]
