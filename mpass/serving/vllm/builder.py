"""Once per step, before any layer runs: which requests are long prefills, for all layers at once.

`SparseBuilder` is mixed in before a builder of vLLM's metadata. Like `layer.py` it imports nothing
of vLLM.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any

from mpass.failures import contain
from mpass.lowering.crossover import LeastLengths
from mpass.serving.vllm.batch import Run, Split, split_batch
from mpass.serving.vllm.counters import process_counters
from mpass.serving.vllm.layer import ATTRIBUTE, SparseForward, StepSplits
from mpass.serving.vllm.settings import describe
from mpass.serving.vllm.warm import warm_layers

log = logging.getLogger("vllm.mpass")


class SparseBuilder:
    """A builder of metadata that notes the long prefills of a step in them.

    It plans all layers of its group, reports the plans, and builds their kernels when it is made:
    after vLLM has loaded the model, and before it takes requests.
    """

    sparse_limits: tuple[LeastLengths, ...] = ()

    def __init__(
        self,
        kv_cache_spec: Any,
        layer_names: list[str],
        vllm_config: Any,
        device: Any,
        **settings: Any,
    ) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **settings)  # type: ignore[call-arg]
        layers = self.sparse_layers(vllm_config, layer_names)
        plans = [impl.plan_for(name) for name, impl in layers.items()]
        self.sparse_limits = tuple(dict.fromkeys(plan.least for plan in plans if not plan.reason))
        if warm_layers(list(layers.values()), device):
            log.info("mpass in vLLM: %s", describe(plans))

    def sparse_layers(
        self, vllm_config: Any, layer_names: Sequence[str]
    ) -> Mapping[str, SparseForward]:
        """The attentions of a group that are ours, by their names."""
        known = vllm_config.compilation_config.static_forward_context
        impls = {name: getattr(known.get(name), "impl", None) for name in layer_names}
        return {name: impl for name, impl in impls.items() if isinstance(impl, SparseForward)}

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> Any:
        """vLLM's metadata of a step, with the splits of its batch if it has long prefills."""
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)  # type: ignore[misc]
        try:
            step = self.split_step(common_attn_metadata, metadata)
        except Exception as error:
            log.warning("vLLM's own attention from now on: %s", contain(error, "splitting a batch"))
            self.sparse_limits = ()
            step = None
        setattr(metadata, ATTRIBUTE, step)
        return metadata

    def build_for_cudagraph_capture(self, common_attn_metadata: Any) -> Any:
        """vLLM's metadata alone: what is captured into a graph takes the parent's way for ever."""
        metadata = super().build_for_cudagraph_capture(common_attn_metadata)  # type: ignore[misc]
        setattr(metadata, ATTRIBUTE, None)
        return metadata

    def split_step(self, common: Any, metadata: Any) -> StepSplits | None:
        """The splits of a step; None if it has no long prefill, or a mask that is not causal."""
        if not self.sparse_limits or not is_plainly_causal(common, metadata):
            return None
        if common.max_query_len < min(limit.queries for limit in self.sparse_limits):
            return None
        lengths = common.seq_lens_cpu_upper_bound
        if lengths is None and common.seq_lens.device.type == "cpu":
            lengths = common.seq_lens
        if lengths is None:  # asking a GPU for them would make the host wait
            return None
        starts = common.query_start_loc_cpu[: common.num_reqs + 1].tolist()
        numbers = lengths[: common.num_reqs].tolist()
        splits: dict[LeastLengths, Split] = {}
        for limit in self.sparse_limits:
            split = split_batch(starts, numbers, limit)
            if split is not None:
                splits[limit] = split
        if not splits:
            return None
        longest = {part for split in splits.values() for part in split.long}
        counters = process_counters()
        counters.add("prefills", len(longest))
        counters.add("prefill_tokens", sum(part.stop - part.start for part in longest))
        runs = {run for split in splits.values() for run in split.rest}
        made = {run: self.build_run(common, run, numbers) for run in runs}
        return StepSplits(splits, made, metadata.block_table)

    def build_run(self, common: Any, run: Run, lengths: Sequence[int]) -> Any:
        """vLLM's metadata of some requests that stand together, as a batch of their own."""
        requests, rows = slice(run.first, run.last), slice(run.start, run.stop)
        starts = slice(run.first, run.last + 1)
        host = common.query_start_loc_cpu[starts] - run.start
        fields = {
            "query_start_loc": common.query_start_loc[starts] - run.start,
            "query_start_loc_cpu": host,
            "num_reqs": run.last - run.first,
            "num_actual_tokens": run.stop - run.start,
            "max_query_len": int(host.diff().max()),
            "max_seq_len": max(lengths[requests]),
        }
        for field in dataclasses.fields(common):
            value = getattr(common, field.name)
            if field.name in fields or value is None:
                continue
            if field.name in PER_REQUEST:
                fields[field.name] = value[requests]
            elif field.name in PER_ROW:
                fields[field.name] = value[rows]
            elif field.name not in SHARED:
                fields[field.name] = None
        # fast_build: a schedule made ahead of time would be written over the whole batch's.
        return super().build(0, common.replace(**fields), True)  # type: ignore[misc]


PER_REQUEST = frozenset(
    {"seq_lens", "seq_lens_cpu_upper_bound", "block_table_tensor", "is_prefilling"}
)
"""Fields of vLLM's CommonAttentionMetadata with an entry per request that a run keeps."""

PER_ROW = frozenset({"slot_mapping", "positions"})
"""Likewise with an entry per row."""

SHARED = frozenset({"causal"})
"""Likewise for the whole batch. What is in none of the three serves attentions that are not split,
or is a cache."""

NOT_CAUSAL = ("mm_req_doc_ranges", "rswa_prefix_lens", "encoder_seq_lens")
"""Fields that a batch has where a mask is not causal."""


def is_plainly_causal(common: Any, metadata: Any) -> bool:
    """Whether every request of a batch sees the keys up to each query, and nothing else."""
    if common.causal is not True or getattr(metadata, "causal", True) is not True:
        return False
    return not any(has_entries(getattr(common, name, None)) for name in NOT_CAUSAL)


def has_entries(value: Any) -> bool:
    """Whether a field of the batch says something."""
    return value is not None and (not hasattr(value, "__len__") or len(value) > 0)
