"""What is measured, as named pieces of work: each gives one row of the results.

A piece is skipped when its row is there already. Names read `section/detail/length`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from mpass.lowering import triton as lowering
from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.triton.interpret import interpreted_language
from torch.nn.attention import SDPBackend

from benchmarks.gpu import check, rivals
from benchmarks.gpu.clock import milliseconds
from benchmarks.gpu.inputs import Shape, computed_flops, dense_index, list_index

Row = dict[str, Any]
Work = tuple[str, Callable[[], Row]]

DENSITIES = (0.01, 0.05, 0.2)
VERTICAL, SLASH = 1000, 6096
"""Budgets of the paper's vertical-slash heads for Llama-3-8B (MInference 1.0, table 6)."""
TOP_K = 100
"""Blocks per query block of the paper's block-sparse heads."""
SLOWEST = 8.0
"""Dense attention that would take longer than this many seconds at 300 TFLOP/s is left out."""


@dataclass(frozen=True)
class Setting:
    """Where to measure and how much. smoke: a dry run on the CPU whose times mean nothing."""

    device: torch.device
    smoke: bool
    lengths: tuple[int, ...]

    def shape(self, length: int) -> Shape:
        if self.smoke:
            return Shape(length, heads=4, kv_heads=2, head_dim=32, dtype=torch.float32)
        return Shape(length)


def all_work(setting: Setting) -> Iterator[Work]:
    """Everything, in order of what is worth knowing first."""
    yield from checks(setting)
    for length in setting.lengths:
        yield from attention(setting, length)
        yield from estimation(setting, length)
        yield f"capture/{length}", functools.partial(capture, setting, length)
    for length in setting.lengths:
        yield f"prefill/{length}", functools.partial(prefill, setting, length)


def checks(setting: Setting) -> Iterator[Work]:
    dtypes = (torch.float32,) if setting.smoke else (torch.bfloat16, torch.float16)
    dims = (32,) if setting.smoke else (64, 80, 96, 128, 192, 256)
    for dtype in dtypes:
        for dim in dims:
            for name, flags in check.FLAGS.items():
                length = 130 if setting.smoke else 1000
                yield (
                    f"check/{name}/{str(dtype).removeprefix('torch.')}/{dim}",
                    functools.partial(
                        check.check_layer, setting.device, dtype, dim, length=length, **flags
                    ),
                )


def attention(setting: Setting, length: int) -> Iterator[Work]:
    for density in (*DENSITIES, 1.0):
        yield (
            f"attention/density {density:g}/{length}",
            functools.partial(sparse_attention, setting, length, density),
        )
    backends = {
        "sdpa": None,
        "flash": SDPBackend.FLASH_ATTENTION,
        "cudnn": SDPBackend.CUDNN_ATTENTION,
    }
    for name, backend in backends.items():
        if not (setting.smoke and backend):
            yield f"attention/{name}/{length}", functools.partial(dense, setting, length, backend)
    if length <= rivals.FLEX_LIMIT:
        for density in DENSITIES[1:]:
            yield (
                f"attention/flex {density:g}/{length}",
                functools.partial(flex, setting, length, density),
            )
    if length <= rivals.FLEX_LIMIT:
        yield f"attention/in-kernel gather/{length}", functools.partial(gather, setting, length)


def sparse_attention(setting: Setting, length: int, density: float) -> Row:
    """The attention op alone over random lists, or over everything."""
    shape = setting.shape(length)
    query, key, value = shape.tensors(setting.device)
    index = dense_index(query) if density == 1.0 else list_index(query, density)
    return time_attention(setting, query, key, value, index) | {"density": density}


def time_attention(
    setting: Setting,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    index: SparseIndex,
) -> Row:
    attend = functools.partial(
        lowering.sparse_attention,
        *(query, key, value, index, AttentionMask()),
        scale=query.shape[-1] ** -0.5,
    )
    spent = milliseconds(attend, setting.device)
    flops = computed_flops(index, query.shape[2], query.shape[-1])
    kv_bytes = 2 * key.numel() * key.element_size()
    return {
        "ms": spent,
        "tflops": flops / spent / 1e9,
        "index_share_of_kv": index.num_bytes() / kv_bytes,
    }


def dense(setting: Setting, length: int, backend: SDPBackend | None) -> Row:
    shape = setting.shape(length)
    if shape.dense_flops / 300e12 > SLOWEST:
        return {"skipped": f"more than {SLOWEST:g} s at 300 TFLOP/s"}
    query, key, value = shape.tensors(setting.device)
    attend = functools.partial(rivals.sdpa, query, key, value, backend)
    spent = milliseconds(attend, setting.device)
    return {"ms": spent, "tflops": shape.dense_flops / spent / 1e9}


def flex(setting: Setting, length: int, density: float) -> Row:
    query, key, value = setting.shape(length).tensors(setting.device)
    index = list_index(query, density)
    attend = rivals.flex(query, key, value, index, compiled=not setting.smoke)
    row = {"ms": milliseconds(attend, setting.device)}
    if setting.smoke:  # uncompiled, it computes all that its mask allows, whatever the blocks
        return row
    ours = lowering.sparse_attention(
        query, key, value, index, AttentionMask(), scale=query.shape[-1] ** -0.5
    )
    return row | {"difference": float((ours.float() - attend().float()).abs().max())}


def gather(setting: Setting, length: int) -> Row:
    """The paper's kernel and ours on one vertical-slash index."""
    import triton

    with triton.knobs.runtime.scope():
        triton.knobs.runtime.interpret = setting.smoke
        from benchmarks.gpu.gather_kernel import gather_attention, row_lists

    query, key, value = setting.shape(length).tensors(setting.device)
    index = vertical_slash(query, key)
    lists = row_lists(index, length)

    def attend() -> torch.Tensor:
        with interpreted_language() if setting.smoke else contextlib.nullcontext():
            return gather_attention(query, key, value, lists)

    ours = time_attention(setting, query, key, value, index)
    sparse = lowering.sparse_attention(
        query, key, value, index, AttentionMask(), scale=query.shape[-1] ** -0.5
    )
    difference = float((sparse.float() - attend().float()).abs().max())
    spent = milliseconds(attend, setting.device)
    return {"ms": spent, "ours_ms": ours["ms"], "difference": difference}


def vertical_slash(query: torch.Tensor, key: torch.Tensor) -> SparseIndex:
    heads = range(query.shape[1])
    return lowering.vertical_slash_index(
        query,
        key,
        AttentionMask(),
        heads,
        scale=query.shape[-1] ** -0.5,
        vertical_sizes=[VERTICAL] * len(heads),
        slash_sizes=[SLASH] * len(heads),
    )


def block_top_k(query: torch.Tensor, key: torch.Tensor) -> SparseIndex:
    heads = range(query.shape[1])
    return lowering.block_top_k_index(
        query,
        key,
        AttentionMask(),
        heads,
        top_k=[TOP_K] * len(heads),
        block_sizes=[64] * len(heads),
    )


def estimation(setting: Setting, length: int) -> Iterator[Work]:
    for name, estimate in {"vertical slash": vertical_slash, "block top k": block_top_k}.items():
        yield (
            f"estimation/{name}/{length}",
            functools.partial(time_estimation, setting, length, estimate),
        )


def time_estimation(setting: Setting, length: int, estimate: Callable[..., SparseIndex]) -> Row:
    """Estimation with index building, and the attention over what it selects."""
    query, key, value = setting.shape(length).tensors(setting.device)
    spent = milliseconds(functools.partial(estimate, query, key), setting.device)
    row = time_attention(setting, query, key, value, estimate(query, key))
    return {"ms": spent, "attention_ms": row["ms"], "share": spent / row["ms"]} | {
        key: row[key] for key in ("tflops", "index_share_of_kv")
    }


def capture(setting: Setting, length: int) -> Row:
    """Estimation and attention without a host sync, then in a CUDA graph replayed on new inputs."""
    query, key, value = setting.shape(length).tensors(setting.device)

    def layer() -> torch.Tensor:
        index = vertical_slash(query, key)
        return lowering.sparse_attention(
            query, key, value, index, AttentionMask(), scale=query.shape[-1] ** -0.5
        )

    layer()
    if setting.smoke:
        return {"skipped": "no CUDA graphs on a CPU"}
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        layer()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layer()
    for tensor in (query, key, value):
        tensor.normal_()
    graph.replay()
    difference = float((captured.float() - layer().float()).abs().max())
    spent = milliseconds(graph.replay, setting.device)
    return {"ms": spent, "difference": difference, "ok": difference == 0.0}


def prefill(setting: Setting, length: int) -> Row:
    """A model shaped like Llama-3.1-8B, random weights: backend="minference" and "inductor"."""
    from transformers import LlamaConfig, LlamaForCausalLM

    import mpass

    tiny: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    tiny |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}
    full: dict[str, Any] = {"hidden_size": 4096, "intermediate_size": 14336}
    full |= {"num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8}
    full |= {"vocab_size": 128256, "rope_theta": 5e5}
    config = LlamaConfig(**(tiny if setting.smoke else full), max_position_embeddings=2 * length)
    config._attn_implementation = "sdpa"
    dtype = torch.float32 if setting.smoke else torch.bfloat16
    with torch.device(setting.device), torch.no_grad():
        before = torch.get_default_dtype()
        torch.set_default_dtype(dtype)
        try:
            model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(before)
    tokens = torch.randint(0, config.vocab_size, (1, length), device=setting.device)
    pattern = mpass.VerticalSlash(VERTICAL, SLASH)
    backends: dict[str, dict[str, Any]] = {
        "minference": {"backend": "minference", "options": {"pattern": pattern}},
        "inductor": {"backend": "inductor"},
    }
    if setting.smoke:
        backends["minference"]["options"] = {
            "pattern": mpass.VerticalSlash(30, 100),
            "min_seq_len": 0,
            "inner_backend": "eager",
        }
        backends["inductor"] = {"backend": "eager"}
    row: Row = {}
    for name, arguments in backends.items():
        torch._dynamo.reset()
        run = torch.compile(model, **arguments)
        with torch.no_grad():
            forward = functools.partial(run, tokens, use_cache=False, logits_to_keep=1)
            row[f"{name}_ms"] = milliseconds(forward, setting.device, most=5)
    row["speedup"] = row["inductor_ms"] / row["minference_ms"]
    return row
