"""Packed requests of transformers' continuous batching: long prefills sparse, the rest as it was.

    mpass.register_attention(paged=True)
    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model.generate_batch(prompts, ...)

Continuous batching packs the new tokens of all requests end to end into one row, and asks for one
of a few attentions by name. "sdpa" is the one of them that continuous batching, `transformers
serve` and the models' own checks accept on every device, and transformers lets everybody register
an attention under a name. What is registered hands everything on to transformers' own function but
steps in which a request has a long prompt, or a long chunk of one.

In such a step each request is attended by itself: its queries are adjacent in the row, and so are
its keys once the cache has gathered them, those of earlier chunks first. `cu_seq_lens_q` and
`cu_seq_lens_k` say where. The mask that transformers builds over all requests is not read.
"""

from __future__ import annotations

import dataclasses
import logging
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mpass.config.sparse_config import SparseConfig
from mpass.errors import MissingPackageError
from mpass.functional import attend
from mpass.graph.shards import owned_heads
from mpass.options import check_values
from mpass.patterns.base import Pattern
from mpass.resolve import SHIPPED, load_shipped
from mpass.serving.vllm.settings import (
    LayerFacts,
    LayerPlan,
    Settings,
    check_settings,
    describe,
    plan_layer,
)

log = logging.getLogger("mpass")

NAME = "sdpa"
"""The name under which packed requests are asked for."""

GIVEN_BY = "register_attention"


def register_packed_attention(
    *,
    pattern: Pattern | str | None = None,
    config: SparseConfig | str | Path | None = None,
    min_seq_len: int | None = None,
    dense_above: float | None = None,
) -> None:
    """Serve packed requests from now on, in every model of this process that asks for "sdpa".

    The parameters are those of `mpass.register_attention`, as are the errors.
    """
    try:
        from transformers import AttentionInterface
    except ImportError as error:
        raise MissingPackageError("transformers", "pip install 'mpass[models]'") from error

    import mpass.lowering.ops  # noqa: F401  (defines minference::attention)

    given: dict[str, Any] = {
        "pattern": pattern,
        "config": config,
        "min_seq_len": min_seq_len,
        "dense_above": dense_above,
    }
    values = check_values({name: value for name, value in given.items() if value is not None})
    settings = Settings(
        given=values.get("config") or SparseConfig(default=values.get("pattern")),
        given_by=values["config_source"].replace("options", GIVEN_BY),
        min_seq_len=values.get("min_seq_len"),
        dense_above=values.get("dense_above", Settings.dense_above),
    )
    AttentionInterface.register(NAME, PackedAttention(settings))


@dataclass(frozen=True, slots=True)
class Request:
    """One request of a step: where its queries and its keys stand in the packed rows."""

    queries: slice
    keys: slice

    @property
    def num_queries(self) -> int:
        """Its new tokens of this step."""
        return int(self.queries.stop - self.queries.start)

    @property
    def num_keys(self) -> int:
        """All its tokens so far, those of this step included."""
        return int(self.keys.stop - self.keys.start)


def packed_requests(query_starts: Tensor, key_starts: Tensor) -> Iterator[Request]:
    """The requests of a step from the sums of their lengths: int [R + 1] each, on a CPU."""
    queries, keys = pairwise(query_starts.tolist()), pairwise(key_starts.tolist())
    for (start, stop), (first, last) in zip(queries, keys, strict=True):
        if stop > start:  # transformers pads a step by requests of no tokens
            yield Request(slice(start, stop), slice(first, last))


class PackedAttention:
    """An attention of transformers that serves packed requests itself where one is long.

    settings: patterns, configs and lengths.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.plans: weakref.WeakKeyDictionary[nn.Module, LayerPlan] = weakref.WeakKeyDictionary()

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        dropout: float = 0.0,
        cache: Any = None,
        **settings: Any,
    ) -> tuple[Tensor, None]:
        """One attention: query [B, H, N, D] -> ([B, N, H, Dv], None), as transformers asks for it.

        Raises ConfigMismatchError for a config of another model, and ConfigFileError for what comes
        with the model and is none.
        """
        plan = None
        if may_be_packed(query, cache, dropout, settings):
            plan = self.plan(module, query, key, value)
            lengths = settings["max_length_k"]
            longest = max(lengths.values()) if isinstance(lengths, dict) else lengths
            if longest < plan.least.keys or settings["max_length_q"] < plan.least.queries:
                plan = None
        if plan is None or plan.reason:
            from transformers.integrations.sdpa_attention import sdpa_attention_forward

            served: tuple[Tensor, None] = sdpa_attention_forward(
                *(module, query, key, value, attention_mask),
                **{"scaling": scaling, "dropout": dropout, "cache": cache, **settings},
            )
            return served
        if cache is not None:
            key, value = cache.update(
                key_states=key, value_states=value, layer_idx=module.layer_idx, kwargs=settings
            )
        requests = packed_requests(settings["cu_seq_lens_q"], settings["cu_seq_lens_k"])
        scale = query.shape[3] ** -0.5 if scaling is None else scaling
        out = query.new_zeros(1, query.shape[2], query.shape[1], value.shape[3])
        for request in requests:
            out[:, request.queries] = self.attend(query, key, value, request, plan, scale)
        return out, None

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        request: Request,
        plan: LayerPlan,
        scale: float,
    ) -> Tensor:
        """One request by itself: packed query [1, H, N, D] -> its own [1, Nq, H, Dv]."""
        rows = query[:, :, request.queries]
        keys, values = key[:, :, request.keys], value[:, :, request.keys]
        offset = request.num_keys - request.num_queries
        if request.num_keys < plan.least.keys or request.num_queries < plan.least.queries:
            dense: Tensor = torch.ops.minference.attention.default(
                *(rows, keys, values, None, None, offset, 0, True, scale, 0.0)
            )
            return dense.transpose(1, 2)
        out = attend(
            *(rows, keys, values),
            patterns=plan.patterns,
            query_offset=offset,
            scale=scale,
            dense_above=self.settings.dense_above,
            layer=plan.layer,
        )
        return out.transpose(1, 2)

    def plan(self, module: nn.Module, query: Tensor, key: Tensor, value: Tensor) -> LayerPlan:
        """What becomes of the layer of a module, decided once."""
        plan = self.plans.get(module)
        if plan is None:
            plan = self.plans[module] = plan_module(module, query, key, value, self.settings)
            log.info("continuous batching: %s", describe([plan], "transformers'"))
        return plan


def may_be_packed(query: Tensor, cache: Any, dropout: float, settings: dict[str, Any]) -> bool:
    """Whether a call is a step of continuous batching that this attention knows how to serve.

    On a GPU it is not: the host would have to wait to know where requests begin, in each layer.
    From transformers 5.24 on the layer itself has written to the cache, and hands on the keys of
    all requests and numbers of this layer; before, the cache and the numbers of each kind of layer.
    """
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return False
    if settings.get("write_index") is None or settings.get("block_table") is not None:
        return False
    if not isinstance(settings.get("max_length_k"), int if cache is None else dict):
        return False
    others = ("sliding_window", "softcap", "s_aux", "position_bias")
    if dropout > 0 or any(settings.get(name) is not None for name in others):
        return False
    return not (torch.is_grad_enabled() and query.requires_grad)


def plan_module(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, settings: Settings
) -> LayerPlan:
    """What becomes of the layer of a module. Raises ConfigMismatchError and ConfigFileError."""
    layer, sizes = getattr(module, "layer_idx", -1), getattr(module, "config", None)
    settings = with_shipped(settings, getattr(sizes, "_name_or_path", ""))
    check_settings(settings, sizes)
    heads, kv_heads = query.shape[1], key.shape[1]
    owned = owned_heads([module], heads, query.shape[3], value.shape[3])
    if any(config.layer(layer).heads for config in settings.configs):
        owned.check_known(heads, layer)
    ranks = (owned.total or heads) // heads
    facts = LayerFacts(
        layer,
        *(heads, kv_heads, query.shape[3], query.dtype, query.device.type),
        rank=(owned.offset or 0) // heads,
        ranks=ranks,
        total_kv_heads=kv_heads if ranks == 1 else None,
    )
    return plan_layer(facts, settings)


def with_shipped(settings: Settings, folder: str) -> Settings:
    """The settings with the config beside a model, if there is one. Raises ConfigFileError."""
    path = Path(folder) / SHIPPED
    if not folder or not path.is_file():
        return settings
    status = path.stat()
    shipped = load_shipped(path, status.st_mtime_ns, status.st_size)
    return dataclasses.replace(settings, shipped=shipped, shipped_by=str(path))


def check_shipped(folder: str, sizes: object) -> None:
    """Hold the config beside a model, if there is one, against the model's sizes.

    sizes: its config, as transformers has it. Raises ConfigMismatchError and ConfigFileError.
    """
    check_settings(with_shipped(Settings(), folder), sizes)
