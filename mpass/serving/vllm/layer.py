"""A layer's attention: the long prefills of a step through mpass, everything else to the parent.

`SparseForward` is mixed in before an attention of vLLM. It knows vLLM's calling conventions and
imports nothing of it, so that stubs can stand in for it in tests.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpass.errors import MpassError, in_one_line
from mpass.failures import contain, is_strict
from mpass.functional import attend
from mpass.lowering.crossover import LeastLengths
from mpass.lowering.recorder import record
from mpass.serving.vllm.batch import LongPrefill, Run, Split
from mpass.serving.vllm.counters import process_counters
from mpass.serving.vllm.settings import LayerFacts, LayerPlan, Settings, plan_layer

log = logging.getLogger("vllm.mpass")
"""Under vLLM's own logger, so that its level and its format apply."""

ATTRIBUTE = "mpass_step"
"""Of the engine's metadata: the StepSplits of a step that has long prefills."""


@dataclass(frozen=True, slots=True, eq=False)
class StepSplits:
    """A step's batch, split for each limit that a layer has.

    splits: by that limit. metadata: what the engine made for a run of its requests. block_table:
    the table that the metadata were made with; under another one they say nothing.
    """

    splits: Mapping[LeastLengths, Split]
    metadata: Mapping[Run, Any]
    block_table: Tensor


class SparseForward:
    """`forward` of an attention of vLLM, for layers of which `sparse_facts` tells what they are.

    A subclass sets `sparse_settings` and `sparse_facts(name)`, and defines `read_pages`.
    """

    sparse_settings: Settings
    sparse_facts: Callable[[str], LayerFacts]
    sparse_plan: LayerPlan | None = None
    sparse_warm: bool = False
    num_heads: int
    num_kv_heads: int
    head_size: int
    sparse_dtype: torch.dtype
    scale: float
    logits_soft_cap: float | None
    sinks: Tensor | None

    def read_pages(
        self, layer: Any, kv_cache: Tensor, blocks: Tensor, length: int
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of a sequence, [1, Hk, length, D] each.

        blocks: the numbers of its pages.
        """
        raise NotImplementedError

    def plan_for(self, name: str) -> LayerPlan:
        """What becomes of this layer, whose name the engine tells when it calls, not before.

        Raises ConfigMismatchError if a config is for another model.
        """
        if self.sparse_plan is None:
            self.sparse_plan = plan_layer(self.sparse_facts(name), self.sparse_settings)
        return self.sparse_plan

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
        """Attention of one step: query [rows, H, D], key, value [rows, Hk, D], output as query.

        The pages hold this step's keys already. Everything else is as of vLLM's own `forward`.
        """
        whole = (layer, query, key, value, kv_cache, attn_metadata, output)
        scales = (output_scale, output_block_scale)
        step = getattr(attn_metadata, ATTRIBUTE, None)
        if step is None or scales != (None, None):
            return self.parent_forward(*whole, *scales)
        plan = self.plan_for(layer.layer_name)
        split = None if plan.reason else step.splits.get(plan.least)
        if split is None or kv_cache.dtype != query.dtype or not is_current(step, attn_metadata):
            process_counters().add("parent")
            return self.parent_forward(*whole, *scales)
        try:
            for part in split.long:
                self.attend_to(plan, part, *whole)
        except Exception as error:
            self.give_up(plan, error)
            return self.parent_forward(*whole, *scales)
        for run in split.rest:
            rows = slice(run.start, run.stop)
            own = [None if part is None else part[rows] for part in (key, value)]
            metadata = step.metadata[run]
            self.parent_forward(layer, query[rows], *own, kv_cache, metadata, output[rows])
        return output

    def give_up(self, plan: LayerPlan, error: Exception) -> None:
        """Leave the layer to the engine for good; raises the error again in strict mode.

        Whatever it is, a request cannot do anything about it, and the engine must live.
        """
        if isinstance(error, MpassError) and not is_strict():
            reason = in_one_line(error)
        else:
            reason = contain(error, f"attention of layer {plan.layer} in vLLM")
        log.warning("mpass: layer %d is vLLM's own from now on: %s", plan.layer, reason)
        self.sparse_plan = LayerPlan(plan.layer, reason=reason)
        process_counters().add("failed")

    def parent_forward(self, *arguments: Any) -> Tensor:
        """The engine's own attention."""
        out: Tensor = super().forward(*arguments)  # type: ignore[misc]
        return out

    def attend_to(
        self,
        plan: LayerPlan,
        part: LongPrefill,
        layer: Any,
        query: Tensor,
        key: Tensor | None,
        value: Tensor | None,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
    ) -> None:
        """Write the rows of one long prefill."""
        rows = slice(part.start, part.stop)
        counters = process_counters()
        if part.context == 0 and key is not None and value is not None:
            keys, values = as_heads(key[rows]), as_heads(value[rows])
        else:
            counters.add("gathered")
            blocks = attn_metadata.block_table[part.request]
            keys, values = self.read_pages(layer, kv_cache, blocks, part.num_keys)
        arguments = (as_heads(query[rows]), keys, values, plan)
        if self.sparse_settings.record:
            with record() as calls:
                out = self.attention(*arguments, part.context)
            for call in calls.calls:
                counters.record(float(call.density.mean()), call.lowering == "dense")
        else:
            out = self.attention(*arguments, part.context)
        output[rows].copy_(out[0].transpose(0, 1))
        counters.add("sparse")

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, plan: LayerPlan, context: int
    ) -> Tensor:
        """mpass's attention of one sequence, [1, H, Nq, D]."""
        return attend(
            query,
            key,
            value,
            patterns=plan.patterns,
            query_offset=context,
            scale=self.scale,
            softcap=self.logits_soft_cap or 0.0,
            sinks=self.sinks,
            dense_above=self.sparse_settings.dense_above,
            layer=plan.layer,
            most_lost=plan.most_lost,
        )


def as_heads(rows: Tensor) -> Tensor:
    """[tokens, heads, D] as [1, heads, tokens, D], a view."""
    return rows.unsqueeze(0).transpose(1, 2)


def is_current(step: StepSplits, metadata: Any) -> bool:
    """Whether the step's splits were made with the page numbers that the metadata hold now.

    vLLM may put another layer group's table into a copy of metadata.
    """
    return metadata.block_table is step.block_table
