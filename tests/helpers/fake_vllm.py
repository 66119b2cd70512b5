"""What stands in for vLLM in tests: a step's metadata, pages, and attention that is right and slow.

Names, arguments and shapes are those of vLLM 0.32. Pages stand row by row, key beside value, as
those of FlashAttention do.
"""

from __future__ import annotations

import dataclasses
import enum
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.helpers.truth import dense_attention

PAGE = 16
"""Tokens of a page."""


@dataclass
class CommonMetadata:
    """A batch, as vLLM's CommonAttentionMetadata."""

    query_start_loc: Tensor
    query_start_loc_cpu: Tensor
    seq_lens: Tensor
    num_reqs: int
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    block_table_tensor: Tensor
    slot_mapping: Tensor
    causal: bool | Tensor = True
    mm_req_doc_ranges: dict[int, list[tuple[int, int]]] | None = None
    rswa_prefix_lens: Tensor | None = None
    encoder_seq_lens: Tensor | None = None
    is_prefilling: Tensor | None = None
    seq_lens_cpu_upper_bound: Tensor | None = None
    _num_computed_tokens_cache: Tensor | None = None

    def replace(self, **fields: Any) -> CommonMetadata:
        return dataclasses.replace(self, **fields)


@dataclass
class Metadata:
    """What a builder makes of a batch."""

    query_start_loc: Tensor
    seq_lens: Tensor
    block_table: Tensor
    slot_mapping: Tensor
    num_actual_tokens: int
    max_query_len: int
    max_seq_len: int
    causal: bool | Tensor = True


class AttentionCGSupport(enum.Enum):
    ALWAYS = 3
    UNIFORM_BATCH = 2
    UNIFORM_SINGLE_TOKEN_DECODE = 1
    NEVER = 0


class Builder:
    """Makes metadata, and keeps the arguments of every call."""

    _cudagraph_support = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        self.layer_names = layer_names
        self.built: list[tuple[CommonMetadata, bool]] = []

    @classmethod
    def get_cudagraph_support(cls, vllm_config, kv_cache_spec):
        return cls._cudagraph_support

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        common = common_attn_metadata
        self.built.append((common, fast_build))
        assert len(common.query_start_loc) == common.num_reqs + 1
        assert len(common.seq_lens) == common.num_reqs == len(common.block_table_tensor)
        assert common.num_actual_tokens == len(common.slot_mapping)
        return Metadata(
            common.query_start_loc,
            common.seq_lens,
            common.block_table_tensor,
            common.slot_mapping,
            common.num_actual_tokens,
            common.max_query_len,
            common.max_seq_len,
            common.causal,
        )

    def build_for_cudagraph_capture(self, common_attn_metadata):
        return self.build(0, common_attn_metadata)


class Attention:
    """Dense attention over pages, request by request; keeps the rows of every call."""

    dcp_world_size = 1
    pcp_world_size = 1

    def __init__(
        self,
        num_heads,
        head_size,
        scale,
        num_kv_heads,
        alibi_slopes=None,
        sliding_window=None,
        kv_cache_dtype="auto",
        logits_soft_cap=None,
        attn_type="decoder",
        kv_sharing_target_layer_name=None,
        sinks=None,
    ):
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads
        self.scale, self.alibi_slopes, self.attn_type = float(scale), alibi_slopes, attn_type
        self.sliding_window = (-1, -1) if sliding_window is None else (sliding_window - 1, 0)
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap or 0
        self.sinks = sinks
        self.served: list[int] = []

    def forward(
        self,
        layer,
        query,
        key,
        value,
        kv_cache,
        attn_metadata,
        output,
        output_scale=None,
        output_block_scale=None,
    ):
        if attn_metadata is None:
            return output.fill_(0)
        self.served.append(attn_metadata.num_actual_tokens)
        starts = attn_metadata.query_start_loc.tolist()
        for request, length in enumerate(attn_metadata.seq_lens.tolist()):
            rows = slice(starts[request], starts[request + 1])
            if rows.start == rows.stop:
                continue
            blocks = attn_metadata.block_table[request, : -(-length // PAGE)].long()
            pages = kv_cache[blocks].transpose(1, 2).flatten(0, 1)[:length]
            keys, values = (part.transpose(0, 1)[None] for part in pages.chunk(2, -1))
            own = query[rows].transpose(0, 1)[None]
            cells = torch.ones(own.shape[2], length, dtype=torch.bool)
            cells = cells.tril(length - own.shape[2])[None, None]
            out = dense_attention(own, keys, values, cells, self.scale)
            output[rows] = out[0].transpose(0, 1).to(output.dtype)
        return output


@dataclass
class Step:
    """One step's tensors, with the truth by request: query, key, value [1, H, N, D]."""

    common: CommonMetadata
    query: Tensor
    key: Tensor
    value: Tensor
    kv_cache: Tensor
    sequences: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)

    def output(self) -> Tensor:
        return torch.full_like(self.query, torch.nan)


def make_step(
    requests: Sequence[tuple[int, int]],
    *,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 32,
    dtype: torch.dtype = torch.float32,
    padding: int = 0,
) -> Step:
    """A step of requests, each (queries, keys before them), whose pages stand in random order.

    padding: rows after the last request, as CUDA graphs have them.
    """
    numbers = torch.Generator().manual_seed(1)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=numbers).to(dtype)

    lengths = [queries + context for queries, context in requests]
    wide = max(-(-length // PAGE) for length in lengths)
    free = (torch.randperm(len(requests) * wide + 3, generator=numbers)).tolist()
    table = torch.zeros(len(requests), wide, dtype=torch.int32)
    cache = normal(len(requests) * wide + 3, kv_heads, PAGE, 2 * head_dim)
    rows: list[list[Tensor]] = [[], [], []]
    slots, sequences = [], []
    for request, (queries, context) in enumerate(requests):
        length = queries + context
        query = normal(queries, heads, head_dim)
        key, value = normal(length, kv_heads, head_dim), normal(length, kv_heads, head_dim)
        for page in range(-(-length // PAGE)):
            table[request, page] = free.pop()
            part = slice(page * PAGE, min(length, (page + 1) * PAGE))
            both = torch.cat([key[part], value[part]], -1).transpose(0, 1)
            cache[table[request, page], :, : both.shape[1]] = both
        positions = torch.arange(context, length)
        slots.append(table[request, positions // PAGE] * PAGE + positions % PAGE)
        for kept, tensor in zip(rows, (query, key[context:], value[context:]), strict=True):
            kept.append(tensor)
        sequences.append(tuple(t.transpose(0, 1)[None] for t in (query, key, value)))
    query, key, value = (
        torch.cat([*part, part[0].new_zeros(padding, *part[0].shape[1:])]) for part in rows
    )
    starts = torch.tensor([0, *(queries for queries, _ in requests)]).cumsum(0).int()
    common = CommonMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts,
        seq_lens=torch.tensor(lengths, dtype=torch.int32),
        num_reqs=len(requests),
        num_actual_tokens=int(starts[-1]),
        max_query_len=max(queries for queries, _ in requests),
        max_seq_len=max(lengths),
        block_table_tensor=table,
        slot_mapping=torch.cat(slots),
        seq_lens_cpu_upper_bound=torch.tensor(lengths, dtype=torch.int32),
    )
    return Step(common, query, key, value, cache, sequences)


@dataclass
class Engine:
    """What the fake vLLM says of itself, and what was registered with it."""

    platform: str = "cuda"
    rank: int = 0
    ranks: int = 1
    dtype: torch.dtype = torch.float32
    model: str = ""
    runner_type: str = "generate"
    max_model_len: int = 4096
    sizes: Any = field(
        default_factory=lambda: SimpleNamespace(
            num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
        )
    )
    additional_config: dict[str, Any] = field(default_factory=dict)
    layers: dict[str, Any] = field(default_factory=dict)
    registered: dict[str, str] = field(default_factory=dict)

    @property
    def vllm_config(self) -> Any:
        model = SimpleNamespace(
            model=self.model,
            dtype=self.dtype,
            hf_config=self.sizes,
            hf_text_config=self.sizes,
            runner_type=self.runner_type,
            max_model_len=self.max_model_len,
            get_total_num_kv_heads=lambda: self.sizes.num_key_value_heads,
        )
        return SimpleNamespace(
            model_config=model,
            additional_config=self.additional_config,
            compilation_config=SimpleNamespace(static_forward_context=self.layers),
        )

    def modules(self) -> dict[str, dict[str, Any]]:
        """What each module of vLLM holds that the plugin asks for."""

        def layer_index(name: str) -> int:
            numbers = [int(part) for part in name.split(".") if part.isdigit()]
            assert len(numbers) == 1, name
            return numbers[0]

        class FlashBackend:
            pass

        class FlashBuilder(Builder):
            pass

        class FlashAttention(Attention):
            pass

        platform = SimpleNamespace(
            device_type="cpu",
            is_cpu=lambda: self.platform == "cpu",
            is_cuda=lambda: self.platform == "cuda",
        )
        names = enum.Enum("AttentionBackendEnum", ["CPU_ATTN", "CUSTOM"])
        types = SimpleNamespace(DECODER="decoder", ENCODER_ONLY="encoder_only")
        return {
            "vllm": {},
            "vllm.config": {"get_current_vllm_config": lambda: self.vllm_config},
            "vllm.distributed": {
                "get_tensor_model_parallel_rank": lambda: self.rank,
                "get_tensor_model_parallel_world_size": lambda: self.ranks,
            },
            "vllm.model_executor": {},
            "vllm.model_executor.models": {},
            "vllm.model_executor.models.utils": {"extract_layer_index": layer_index},
            "vllm.platforms": {"current_platform": platform},
            "vllm.v1": {},
            "vllm.v1.attention": {},
            "vllm.v1.attention.backend": {
                "AttentionType": types,
                "AttentionCGSupport": AttentionCGSupport,
            },
            "vllm.v1.attention.backends": {},
            "vllm.v1.attention.backends.registry": {
                "AttentionBackendEnum": names,
                "register_backend": lambda backend, path: self.registered.update(
                    {backend.name: path}
                ),
            },
            "vllm.v1.attention.backends.flash_attn": {
                "FlashAttentionBackend": FlashBackend,
                "FlashAttentionImpl": FlashAttention,
                "FlashAttentionMetadataBuilder": FlashBuilder,
            },
        }

    def install(self, monkeypatch: Any) -> None:
        """Put the modules where imports find them, and forget ours that were imported before."""
        for name in [name for name in sys.modules if name.split(".")[0] == "vllm"]:
            monkeypatch.delitem(sys.modules, name)
        for name in ("registration", "engine", "cpu", "cuda"):
            monkeypatch.delitem(sys.modules, f"mpass.serving.vllm.{name}", raising=False)
        for name, entries in self.modules().items():
            module = ModuleType(name)
            module.__dict__.update(entries)
            monkeypatch.setitem(sys.modules, name, module)
