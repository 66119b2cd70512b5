"""What is asked of vLLM itself, by the attentions of both kinds of devices.

Everything here imports vLLM, of which names of version 0.32 are used.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_current_vllm_config
from vllm.distributed import (
    get_tensor_model_parallel_rank,
    get_tensor_model_parallel_world_size,
)
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from mpass.serving.vllm.layer import SparseForward
from mpass.serving.vllm.settings import LayerFacts, check_settings, read_settings


class EngineLayer(SparseForward):
    """What vLLM's attentions tell of themselves, for every device."""

    attn_type: str
    kv_cache_dtype: str
    alibi_slopes: Any
    dcp_world_size: int
    pcp_world_size: int

    def read_engine(self) -> None:
        """Read the configuration of the engine, which is at hand while the model is made only.

        Raises the errors of `read_settings`, and ConfigMismatchError for another model's config.
        """
        vllm_config = get_current_vllm_config()
        model = vllm_config.model_config
        self.engine_model = model
        self.engine_layers = vllm_config.compilation_config.static_forward_context
        self.engine_draft = getattr(model, "runner_type", "") == "draft"
        self.sparse_dtype = model.dtype
        self.sparse_settings = read_settings(vllm_config.additional_config, str(model.model))
        if not self.engine_draft:
            check_settings(self.sparse_settings, model.hf_config)

    def sparse_facts(self, name: str) -> LayerFacts:
        """What is known of this layer, by its name in the model."""
        model = self.engine_model
        ranks = get_tensor_model_parallel_world_size()
        whole = self.num_heads * ranks == getattr(model.hf_text_config, "num_attention_heads", 0)
        layer = self.engine_layers.get(name)
        chunked = getattr(layer, "attention_chunk_size", None) is not None
        obstacle = "attention in chunks" if chunked else self.obstacle()
        try:
            number = extract_layer_index(name)
        except (AssertionError, ValueError):
            number, obstacle = -1, obstacle or f"the number of layer {name!r} is unknown"
        return LayerFacts(
            layer=number,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_size,
            dtype=self.sparse_dtype,
            device=current_platform.device_type,
            rank=get_tensor_model_parallel_rank(),
            ranks=ranks,
            total_kv_heads=model.get_total_num_kv_heads() if whole else None,
            num_layers=getattr(model.hf_text_config, "num_hidden_layers", None),
            softcap=float(self.logits_soft_cap or 0.0),
            obstacle=obstacle,
        )

    def window(self) -> int:
        """Keys that a query sees before it; below 0 for all."""
        raise NotImplementedError

    def obstacle(self) -> str:
        """Why this layer is vLLM's whatever it is given, or ""."""
        if self.engine_draft:
            return "a draft model"
        if self.attn_type != AttentionType.DECODER:
            return f"{self.attn_type} attention"
        if self.alibi_slopes is not None:
            return "ALiBi"
        if self.window() >= 0:
            return "a sliding window"
        if self.kv_cache_dtype not in ("auto", str(self.sparse_dtype).removeprefix("torch.")):
            return f"pages of {self.kv_cache_dtype}"
        if max(self.dcp_world_size, self.pcp_world_size) > 1:
            return "context parallelism: pages are spread over ranks"
        return ""
