"""What sparse attention did on one prompt: `mpass.profile(model, inputs)`.

Per layer and head: what was selected, the density really computed, the recall of the exact
attention, and the time of estimation and attention. Memory stays O(N): every layer is measured
while it runs, and what it read is not kept.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mpass.files import write_whole
from mpass.inspection.advice import advise
from mpass.inspection.explanation import (
    Explanation,
    finish_explanation,
    make_capture,
    run_captured,
    uncompiled,
)
from mpass.inspection.looks import QueryLooks, choose_queries, measure_looks
from mpass.inspection.provenance import describe
from mpass.inspection.recall import Recall, measure_recall
from mpass.inspection.results import HeadProfile, LayerProfile, ProfileFields
from mpass.inspection.tables import profile_lines, profile_table, render_profile
from mpass.inspection.text_table import as_html
from mpass.lowering import meter
from mpass.lowering.density import density as count_density
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.kernel_sources import KernelSource, generated_sources
from mpass.lowering.recorder import AttentionCall, CallInputs
from mpass.lowering.reference.dense import dense_attention

DENSE_OPS = (
    "aten::scaled_dot_product_attention",
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
)
"""How dense attention shows in torch's profiler, outermost first."""

ENOUGH_SECONDS = 0.1
"""A call of dense attention that takes longer is timed once."""

QUIET = "KINETO_LOG_LEVEL"
"""Environment variable of torch's profiler: lines below this level are not written."""

CONTAINER = "minference::masked_attention"
"""An op of ours that calls those that count."""


@dataclass(frozen=True, eq=False)
class Profile(ProfileFields):
    """What happened on a prompt: `print` it, read its fields, or `save` it as JSON or HTML."""

    explanation: Explanation

    def save(self, path: str | os.PathLike[str], *, beside: Profile | None = None) -> None:
        """Write `.html` as a page, anything else as JSON.

        beside: another profile to compare this one with on the page.
        """
        target = Path(path)
        if target.suffix == ".html":
            from mpass.inspection.page import build_page  # jinja2, compilers: only when asked

            write_whole(target, build_page(self.explanation, self, beside=beside))
        else:
            write_whole(target, json.dumps(self.as_dict(), indent=1, default=str) + "\n")

    def __str__(self) -> str:
        return render_profile(self)

    def _repr_html_(self) -> str:
        return as_html(profile_table(self), profile_lines(self))


@dataclass(frozen=True)
class Queries:
    """What kernels are chosen by. softcap: whether there is one."""

    device: str
    dtype: torch.dtype
    head_dim: int
    softcap: bool


@dataclass(frozen=True, eq=False)
class Measured:
    """A call, the density of what it selected (fp64 [H], also where dense ran), and its recall."""

    call: AttentionCall
    density: Tensor
    recall: Recall
    looks: QueryLooks
    dense_seconds: float


def profile(
    model: Callable[..., Any],
    inputs: Tensor | Sequence[Any] | Mapping[str, Any],
    *,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    max_query_blocks: int = 64,
    resolution: int = 128,
    progress: Callable[[str], object] | None = None,
    tokens: Sequence[str] = (),
    queries: Sequence[int] = (),
    about: Mapping[str, str] | None = None,
) -> Profile:
    """Run a model on a prompt and compare its sparse attention with the exact one.

    The model runs three times, in the caller's gradient mode.

    model: a module or a function, not compiled.
    inputs: a tensor, a sequence of positional arguments, or a mapping of keyword arguments.
    options: those of torch.compile; "inner_backend" is "eager" unless they say otherwise.
    dynamic: the `dynamic` of torch.compile.
    max_query_blocks: the number of blocks of 64 queries per layer whose exact attention is
        computed, evenly spaced over the prompt; 0 for all.
    resolution: the number of rows and columns of the maps.
    progress: is told in words what is done.
    tokens: the prompt's own tokens as text, one per position, for the page to show.
    queries: positions of tokens from which to look at single keys; 16 over the prompt by default.
    about: names and values that say what this is of, such as "model" and "prompt".

    Raises what the options raise.
    """
    args, kwargs = split_inputs(inputs)
    measured: list[Measured] = []
    kinds: set[Queries] = set()
    capture = make_capture({**(options or {}), "measure": True})
    tell = progress or (lambda text: None)

    def inspect(call: AttentionCall, operands: CallInputs) -> None:
        sizes = {"batch": operands.query.shape[0], "num_queries": call.num_queries}
        share = count_density(operands.index, operands.mask, **sizes, num_keys=call.num_keys)
        recall = measure_recall(
            operands, max_query_blocks=max_query_blocks or 1 << 30, resolution=resolution
        )
        query, offset = operands.query, operands.mask.query_offset
        looks = measure_looks(operands, choose_queries(call.num_queries, offset, queries))
        measured.append(Measured(call, share.mean(0).cpu(), recall, looks, time_dense(operands)))
        softcap = operands.softcap > 0
        kinds.add(Queries(query.device.type, query.dtype, query.shape[-1], softcap))
        total = sum(site.status == "sparse" for graph in capture.graphs for site in graph.sites)
        tell(f"measured {len(measured)} of {total} attentions")

    tell("capturing the model")
    log = run_captured(capture, model, args, kwargs, dynamic, inspect)
    tell("timing two runs")
    provenance = describe(model, options, about)
    explanation = finish_explanation(model, capture, log, provenance)
    original = getattr(model, "_orig_mod", model)
    compiled = torch.compile(original, backend=capture, dynamic=dynamic)
    ran_dense = [bool(item.call.reason) for item in measured]
    losses = measured_losses(explanation)
    with meter.paused(), uncompiled(original):
        steps, seconds = time_ops(lambda: compiled(*args, **kwargs), ran_dense)
    if len(steps) != len(measured):
        steps = [(0.0, 0.0)] * len(measured)
    layers = tuple(
        describe_layer(item, explanation, step, losses.get(item.call.layer))
        for item, step in zip(measured, steps, strict=True)
    )
    kernels = tuple(kernel for kernel in generated_sources() if serves(kernel, kinds))
    return Profile(explanation, layers, seconds, kernels, tuple(tokens))


def serves(kernel: KernelSource, queries: Collection[Queries]) -> bool:
    """Whether a kernel of this process is for such queries.

    The process may have run other models before, whose kernels say nothing about this one.
    """
    spec: Any = kernel.spec
    for seen in queries:
        own = device_lowering(seen.device)
        if own.language == kernel.language and own.made_for(
            spec, seen.dtype, seen.head_dim, seen.softcap
        ):
            return True
    return False


def measured_losses(explanation: Explanation) -> dict[int, meter.Loss]:
    """What the meter kept of each layer that was compiled to be sparse."""
    known = {site.layer: meter.loss_of(site.measured) for site in explanation.sites}
    return {layer: loss for layer, loss in known.items() if loss is not None}


def split_inputs(inputs: object) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments of a call."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, list | tuple):
        return tuple(inputs), {}
    return (inputs,), {}


def describe_layer(
    item: Measured,
    explanation: Explanation,
    seconds: tuple[float, float],
    loss: meter.Loss | None = None,
) -> LayerProfile:
    """Put what was measured of one call into words and numbers."""
    call, recall = item.call, item.recall
    site = next(
        (s for s in explanation.sites if s.layer == call.layer and s.status == "sparse"), None
    )
    names = site.patterns if site else ("",) * len(recall.recall)
    heads = tuple(
        HeadProfile(
            head=head,
            pattern=names[head],
            density=float(item.density[head]),
            recall=float(recall.recall[head]),
            error=loss.error[head] if loss and loss.error else 0.0,
            worst=recall.worst[head],
            output_error=(
                None if recall.output_error is None else float(recall.output_error[head])
            ),
            advice=advise(
                names[head],
                float(recall.recall[head]),
                float(item.density[head]),
                recall.lost_by_distance[head],
                recall.lost_by_block[head],
                dense_reason=call.reason,
            ),
        )
        for head in range(len(recall.recall))
    )
    return LayerProfile(
        layer=call.layer,
        path=site.path if site else "",
        lowering=call.lowering,
        dense_reason=call.reason,
        num_queries=call.num_queries,
        num_keys=call.num_keys,
        index_bytes=call.index_bytes,
        index_seconds=seconds[0],
        attention_seconds=seconds[1],
        query_blocks=tuple(recall.query_blocks),
        all_queries=recall.all_queries,
        heads=heads,
        computed=recall.computed,
        exact=recall.exact,
        dense_seconds=item.dense_seconds,
        looks=item.looks,
    )


def time_dense(operands: CallInputs) -> float:
    """Seconds of dense attention on the same inputs, as the op runs it: the least of some calls."""
    if operands.value is None:
        return 0.0
    inputs = AttentionInputs(
        *(operands.query, operands.key, operands.value, operands.mask, operands.scale),
        softcap=operands.softcap,
        sink_logits=operands.sinks,
    )
    shortest = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        dense_attention(inputs)
        if operands.query.is_cuda:
            torch.cuda.synchronize()
        shortest = min(shortest, time.perf_counter() - start)
        if shortest > ENOUGH_SECONDS:
            break
    return shortest


def time_ops(
    run: Callable[[], object], ran_dense: Sequence[bool] = ()
) -> tuple[list[tuple[float, float]], dict[str, float]]:
    """Seconds of estimation and attention per sparse attention in order, and of all parts.

    The second of two runs is timed, so that nothing is compiled in it. ran_dense: of each sparse
    attention, whether its op took every key: that is time of dense attention.
    """
    run()
    activities = [torch.profiler.ProfilerActivity.CPU]
    cuda = torch.cuda.is_available()
    if cuda:
        activities.append(torch.profiler.ProfilerActivity.CUDA)
        torch.cuda.synchronize()
    with quiet_profiler(), torch.profiler.profile(activities=activities) as profiler:
        start = time.perf_counter()
        run()
        if cuda:
            torch.cuda.synchronize()
        total = time.perf_counter() - start
    steps: list[tuple[float, float]] = []
    parts = dict.fromkeys(("index", "attention", "dense attention"), 0.0)
    index = 0.0
    for name, seconds in outermost_ops(profiler.events(), cuda):
        if not name.startswith("minference::"):
            parts["dense attention"] += seconds
        elif name == "minference::sparse_attention":
            dense = len(steps) < len(ran_dense) and ran_dense[len(steps)]
            steps.append((index, seconds))
            parts["index"] += index
            parts["dense attention" if dense else "attention"] += seconds
            index = 0.0
        elif name == "minference::check_block_lists":  # comes after its attention
            parts["attention"] += seconds
        else:
            index += seconds
    return steps, parts | {"rest": max(0.0, total - sum(parts.values()))}


@contextlib.contextmanager
def quiet_profiler() -> Iterator[None]:
    """Without the lines that torch's profiler writes to standard error of its own."""
    if QUIET in os.environ:
        yield
        return
    os.environ[QUIET] = "99"
    try:
        yield
    finally:
        del os.environ[QUIET]


def outermost_ops(events: Sequence[Any], cuda: bool) -> Iterator[tuple[str, float]]:
    """Attention ops that no other one contains, in order, with their seconds."""
    end = float("-inf")
    for event in sorted(events, key=lambda e: (e.time_range.start, -e.time_range.end)):
        if not (event.name.startswith("minference::") or event.name in DENSE_OPS):
            continue
        if event.name == CONTAINER:
            continue
        if event.time_range.start < end:
            continue
        end = event.time_range.end
        device_time = getattr(event, "device_time_total", 0) if cuda else 0
        yield event.name, (device_time or event.cpu_time_total) / 1e6
