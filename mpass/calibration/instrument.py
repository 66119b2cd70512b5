"""Looking into a model's attentions while it runs, through the same matched graph as the backend.

Every site that the backend could make sparse is replaced by one call of a Python function, so the
search sees query, key and value of any model that is served, and decides what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpass.graph.dead_code import remove_dead
from mpass.graph.lengths import as_argument
from mpass.graph.new_nodes import copy_meta
from mpass.graph.site import AttentionSite
from mpass.lowering.dispatch import choose_lowering
from mpass.lowering.index import AttentionMask, SparseIndex, join_indexes
from mpass.lowering.inputs import AttentionInputs, EstimateInputs
from mpass.match import find_attention, open_calls, settle_calls
from mpass.patterns.base import Pattern
from mpass.plan import reason_to_skip
from mpass.rewrite import insert_dimensions, insert_keys


@dataclass(frozen=True, eq=False)
class AttentionOperands:
    """What one attention reads: query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv]."""

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    mask: AttentionMask
    scale: float
    softcap: float
    sinks: Tensor | None

    @property
    def num_heads(self) -> int:
        return self.query.shape[1]

    def inputs(self) -> AttentionInputs:
        """The same as a lowering takes it."""
        return AttentionInputs(
            self.query,
            self.key,
            self.value,
            self.mask,
            self.scale,
            self.softcap,
            sink_logits=self.sinks,
        )


Attend = Callable[[AttentionOperands], Tensor]


class Instrument:
    """A compiled forward whose attentions all go through `attend`, which may be changed at will.

    layers: of the sites found so far, in graph order; skipped: why other sites stayed as they are.
    """

    def __init__(self, forward: Callable[..., Any]) -> None:
        self.attend: Attend = attend_dense
        self.layers: list[int] = []
        self.skipped: list[str] = []
        self.compiled = torch.compile(forward, backend=self.backend, dynamic=False)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Beyond its limit Dynamo would run the model uncompiled, unseen by `attend`.
        with (
            torch.no_grad(),
            torch._dynamo.config.patch(recompile_limit=64, fail_on_recompile_limit_hit=True),
        ):
            return self.compiled(*args, **kwargs)

    def backend(self, gm: fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
        """Replace the sites of a graph; it runs as it is, nothing else is compiled."""
        taken: set[int] = set()
        chosen: list[AttentionSite] = []
        opened = open_calls(gm.graph)
        for found in find_attention(gm):
            # What is measured is under a mask in words: one that is read at run time has none yet.
            site = dataclasses.replace(found, mask_tensor=None)
            reason = reason_to_skip(site)
            if not reason and (site.mask is None or not site.mask.causal):
                reason = "not causal"
            if not reason and (site.layer < 0 or site.layer in taken):
                reason = "its layer has no number of its own"
            if reason:
                self.skipped.append(f"{site.path or site.output.name}: {reason}")
                continue
            taken.add(site.layer)
            chosen.append(site)
        for site in reversed(chosen):  # So that a site reads the call that replaces one before it.
            insert_call(gm.graph, site, self.call)
        replaced = [site.output for site in chosen]
        settle_calls(gm.graph, opened, replaced)
        remove_dead(gm.graph, replaced)
        gm.graph.lint()
        gm.recompile()
        self.layers = sorted({*self.layers, *taken})
        return gm.forward

    def call(self, layer: int, *arguments: Any) -> Tensor:
        """What stands in the graph: the arguments of an attention, flat."""
        query, key, value, key_mask, sinks, offset, window, causal, scale, softcap = arguments
        mask = AttentionMask(causal, int(offset), window, key_mask)
        return self.attend(AttentionOperands(layer, query, key, value, mask, scale, softcap, sinks))


def insert_call(graph: fx.Graph, site: AttentionSite, call: Callable[..., Tensor]) -> None:
    """Put `call` in the place of a site that `reason_to_skip` has nothing against."""
    mask = site.mask
    if mask is None:
        raise AssertionError(f"site {site.path or site.output.name} has no proven mask")

    def attention(*arguments: Any) -> Tensor:
        return call(*arguments)

    with graph.inserting_before(site.output):
        key, value, key_mask = insert_keys(graph, site, mask)
        output = graph.call_function(
            attention,
            (
                site.layer,
                site.query,
                key,
                value,
                key_mask,
                site.sinks,
                as_argument(graph, mask.query_offset),
                mask.window,
                mask.causal,
                site.scale,
                site.softcap,
            ),
        )
        copy_meta(site.output, output)
        arranged = insert_dimensions(graph, site, output)
        if arranged is not output:
            copy_meta(site.output, arranged)
            output = arranged
    site.output.replace_all_uses_with(output)


def attend_dense(operands: AttentionOperands) -> Tensor:
    """The attention as the model has it, by the fastest dense kernel that the backend has."""
    inputs = operands.inputs()
    return choose_lowering(inputs).dense_attention(inputs)


def attend_sparse(operands: AttentionOperands, patterns: Sequence[Pattern]) -> Tensor:
    """The attention with a pattern per query head, by the lowering that the backend would use."""
    return attend_index(operands, estimate_heads(operands, patterns))


def attend_index(operands: AttentionOperands, index: SparseIndex) -> Tensor:
    """Sparse attention over an index."""
    inputs = operands.inputs()
    return choose_lowering(inputs).sparse_attention(inputs, index)


def estimate_heads(operands: AttentionOperands, patterns: Sequence[Pattern]) -> SparseIndex:
    """The index of all query heads, one pattern each, as the rewritten graph would estimate it."""
    groups: dict[type[Pattern], list[int]] = {}
    for head, pattern in enumerate(patterns):
        groups.setdefault(type(pattern), []).append(head)
    parts = [
        cls.estimate(
            EstimateInputs(operands.query, operands.key, operands.mask, heads, operands.scale),
            [patterns[head] for head in heads],
        )
        for cls, heads in groups.items()
    ]
    return parts[0] if len(parts) == 1 else join_indexes(parts, list(groups.values()))
