"""vLLM's backend on CPUs, with long prefills through mpass."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor
from vllm import _custom_ops as vllm_ops
from vllm.v1.attention.backends.cpu_attn import (
    CPUAttentionBackend,
    CPUAttentionBackendImpl,
    CPUAttentionMetadataBuilder,
)

from mpass.serving.vllm.builder import SparseBuilder
from mpass.serving.vllm.engine import EngineLayer
from mpass.serving.vllm.pages import PageLayout, gather, learn_layout


class SparseCPUBackend(CPUAttentionBackend):
    """Stands in for CPU_ATTN under its name, which vLLM looks up in its own list."""

    @staticmethod
    def get_impl_cls() -> type[CPUAttentionBackendImpl]:
        """The attention of one layer."""
        return SparseCPUImpl

    @staticmethod
    def get_builder_cls() -> type[CPUAttentionMetadataBuilder]:
        """What describes a step."""
        return SparseCPUBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """An estimated pattern depends on where a prompt is cut into chunks."""
        return False


class SparseCPUBuilder(SparseBuilder, CPUAttentionMetadataBuilder):
    """vLLM's builder, which notes long prefills."""

    parent_class = CPUAttentionMetadataBuilder


class SparseCPUImpl(EngineLayer, CPUAttentionBackendImpl):
    """vLLM's attention, which hands long prefills to mpass."""

    parent_class = CPUAttentionBackendImpl

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.read_engine()

    def window(self) -> int:
        """Keys that a query sees before it; below 0 for all."""
        return int(self.sliding_window)

    def read_pages(
        self, layer: Any, kv_cache: Tensor, blocks: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, from pages laid out for an instruction set."""
        size, width = kv_cache.shape[2:]
        layout = page_layout(layer.isa, size, width // 2, kv_cache.dtype)
        return gather(kv_cache, blocks, length, layout)


@functools.cache
def page_layout(isa: str, size: int, head_dim: int, dtype: torch.dtype) -> PageLayout:
    """How vLLM's kernels of an instruction set lay out a page, asked of the kernel that writes it.

    size: tokens of a page.
    """

    def write(
        key: Tensor, value: Tensor, key_pages: Tensor, value_pages: Tensor, slots: Tensor
    ) -> None:
        vllm_ops.cpu_attn_reshape_and_cache(key, value, key_pages, value_pages, slots, isa)

    return learn_layout(write, size, head_dim, dtype)
