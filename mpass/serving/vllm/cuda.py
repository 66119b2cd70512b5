"""vLLM's FlashAttention on CUDA, with long prefills through mpass: `--attention-backend CUSTOM`.

No GPU has run this file yet: it is held against vLLM's interfaces, and its parts are tested on
CPUs. Three things differ from the CPU's backend:

- Lengths come from the host's own copies, so that nothing waits for the GPU. A step without them is
  vLLM's.
- Pages stand row by row, key beside value, and are copied out into a workspace of one sequence.
- CUDA graphs: the builder reports UNIFORM_BATCH, whatever FlashAttention reports. vLLM then
  captures whole steps of decoding alone, and runs attention outside of graphs in steps that have
  prefills (FULL_AND_PIECEWISE). Metadata for a capture have no splits, so that the parent's way is
  what a graph holds in any case.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)

from mpass.serving.vllm.builder import SparseBuilder
from mpass.serving.vllm.engine import EngineLayer
from mpass.serving.vllm.pages import PageLayout, gather

ROWS = PageLayout()


class SparseFlashBackend(FlashAttentionBackend):
    """FlashAttention under the name CUSTOM, by which the user asks for it."""

    @staticmethod
    def get_name() -> str:
        """A name of vLLM's own list, as vLLM looks it up there."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlashAttentionImpl]:
        """The attention of one layer."""
        return SparseFlashImpl

    @staticmethod
    def get_builder_cls() -> type[FlashAttentionMetadataBuilder]:
        """What describes a step."""
        return SparseFlashBuilder

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """An estimated pattern depends on where a prompt is cut into chunks."""
        return False

    @classmethod
    def supports_device_cpu_query_lens_mismatch(cls) -> bool:
        """Batches are split by the host's numbers, so that the GPU must not have others."""
        return False


class SparseFlashBuilder(SparseBuilder, FlashAttentionMetadataBuilder):
    """vLLM's builder, which notes long prefills."""

    parent_class = FlashAttentionMetadataBuilder
    supports_update_block_table: bool = False
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    @classmethod
    def get_cudagraph_support(cls, vllm_config: Any, kv_cache_spec: Any) -> AttentionCGSupport:
        """No graph may hold a step with a prefill; see the module."""
        least: AttentionCGSupport = min(
            FlashAttentionMetadataBuilder.get_cudagraph_support(vllm_config, kv_cache_spec),
            AttentionCGSupport.UNIFORM_BATCH,
            key=lambda support: support.value,
        )
        return least


class SparseFlashImpl(EngineLayer, FlashAttentionImpl):
    """FlashAttention, which hands long prefills to mpass."""

    parent_class = FlashAttentionImpl

    def __init__(self, *arguments: Any, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.read_engine()

    def window(self) -> int:
        """Keys that a query sees before it; below 0 for all."""
        return int(self.sliding_window[0])

    def read_pages(
        self, layer: Any, kv_cache: Tensor, blocks: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, which stand beside one another in a page."""
        return gather(kv_cache, blocks, length, ROWS)

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """As `SparseForward`; a profiling run meets the memory that a gathered sequence takes."""
        if attn_metadata is None and not self.plan_for(layer.layer_name).reason:
            length, dim = self.engine_model.max_model_len, self.head_size
            shape = (2, 2, length, self.num_kv_heads, dim)  # the pages copied, and made contiguous
            torch.empty(shape, dtype=query.dtype, device=query.device)
        return super().forward(
            *(layer, query, key, value, kv_cache, attn_metadata, output),
            *(output_scale, output_block_scale),
        )
