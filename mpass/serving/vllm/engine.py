"""What is asked of vLLM itself, by the backends of both kinds of devices.

Everything here imports vLLM. Names of vLLM 0.32 are used; `register_backends` imports all of them,
so that another version that lacks one is found out before anything is registered.
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
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from mpass.serving.vllm.layer import SparseForward
from mpass.serving.vllm.settings import LayerFacts, check_settings, read_settings

PACKAGE = "mpass.serving.vllm"


def register_backends() -> None:
    """Register the backend of this platform; raises whatever speaks against it.

    The CPU platform ignores the backend that a user names, but asks the registry for the class of
    its own one: an override is the only way in. On CUDA the user names CUSTOM.
    """
    if current_platform.is_cpu():
        from mpass.serving.vllm.cpu import SparseCPUBackend

        check_backend(SparseCPUBackend)
        register_backend(AttentionBackendEnum.CPU_ATTN, f"{PACKAGE}.cpu.SparseCPUBackend")
    elif current_platform.is_cuda():
        from mpass.serving.vllm.cuda import SparseFlashBackend

        check_backend(SparseFlashBackend)
        register_backend(AttentionBackendEnum.CUSTOM, f"{PACKAGE}.cuda.SparseFlashBackend")


def check_backend(backend: Any) -> None:
    """Raise TypeError if vLLM's classes are not called as those that this was written for."""
    impl, builder = backend.get_impl_cls(), backend.get_builder_cls()
    expected = {
        impl.parent_class.forward: (
            *("self", "layer", "query", "key", "value", "kv_cache", "attn_metadata", "output"),
            *("output_scale", "output_block_scale"),
        ),
        builder.parent_class.build: (
            *("self", "common_prefix_len", "common_attn_metadata", "fast_build"),
        ),
        builder.parent_class.__init__: (
            *("self", "kv_cache_spec", "layer_names", "vllm_config", "device"),
        ),
    }
    for function, names in expected.items():
        code = function.__code__
        found = code.co_varnames[: code.co_argcount]
        if found != names:
            place = f"{function.__module__}.{function.__qualname__}"
            raise TypeError(f"{place} takes {', '.join(found)}; known is {', '.join(names)}")


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

    def sparse_facts(self, name: str) -> LayerFacts:  # type: ignore[override]
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
