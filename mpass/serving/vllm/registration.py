"""The backends are registered with vLLM, after a look at whether it is the vLLM that they know.

All that they use of vLLM is imported here, so that a version that lacks a name is found out before
anything is registered.
"""

from __future__ import annotations

from typing import Any

from vllm.platforms import current_platform
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

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
