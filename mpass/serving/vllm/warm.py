"""Before the first request, kernels are built, and what they cost on this machine is known.

vLLM's own profiling runs have no metadata and so reach no attention: without this, the first user
would wait for the compilers.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence

import torch

from mpass.lowering.device import Lowering
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.index import BLOCK
from mpass.serving.vllm.layer import SparseForward
from mpass.serving.vllm.settings import LayerPlan
from mpass.warm_up import start_attention, start_estimator

log = logging.getLogger("vllm.mpass")

LONGEST = 2048
"""Tokens of the attention that is run to build and to time; costs are fitted to any length."""


def warm_layers(layers: Sequence[SparseForward], device: torch.device | str) -> bool:
    """Run each kind of layer once on random numbers. Returns whether any layer was new.

    What goes wrong here goes wrong again, and is told, where a request needs it.
    """
    fresh = [layer for layer in layers if not layer.sparse_warm]
    kinds: dict[object, tuple[SparseForward, LayerPlan]] = {}
    for layer in fresh:
        layer.sparse_warm = True
        plan = layer.sparse_plan
        if plan is None or plan.reason:
            continue
        sizes = (layer.num_heads, layer.num_kv_heads, layer.head_size, layer.sparse_dtype)
        logits = (bool(layer.logits_soft_cap), layer.sinks is None)
        kinds.setdefault((plan.patterns, *sizes, *logits), (layer, plan))
    lowering = device_lowering(torch.device(device))
    for layer, plan in kinds.values():
        build_together(lowering, layer, plan)
    for layer, plan in kinds.values():
        try:
            with torch.inference_mode():
                run_once(layer, plan, torch.device(device))
        except Exception as error:
            log.debug("warming layer %d: %s", plan.layer, error)
    return bool(fresh)


def build_together(lowering: Lowering, layer: SparseForward, plan: LayerPlan) -> None:
    """Build what a layer needs, in threads of which each waits for a compiler."""
    if not lowering.builds_ahead or lowering.prepare is not None:
        return
    dtype, size = layer.sparse_dtype, layer.head_size
    threads = [start_attention(lowering, dtype, size, size, float(layer.logits_soft_cap or 0.0))]
    for cls in dict.fromkeys(map(type, plan.patterns)):
        threads.append(start_estimator(lowering, cls, dtype, size))
    for thread in threads:
        thread.join()


def run_once(layer: SparseForward, plan: LayerPlan, device: torch.device) -> None:
    """The attention of a layer over a prompt, and over a chunk after it."""
    length = max(2 * BLOCK, min(LONGEST, plan.least.keys))
    numbers = torch.Generator(device).manual_seed(0)
    query, key, value = (
        torch.randn(1, length, heads, layer.head_size, generator=numbers, device=device)
        .to(layer.sparse_dtype)
        .transpose(1, 2)
        for heads in (layer.num_heads, layer.num_kv_heads, layer.num_kv_heads)
    )
    layer.attention(query, key, value, plan, 0)
    layer.attention(query[:, :, length // 2 :], key, value, plan, length // 2)
