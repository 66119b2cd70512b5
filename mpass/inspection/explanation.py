"""What the compiler makes of a model, without compiling it: `mpass.explain(model, *args)`.

The model is captured, rewritten and run once with plain torch (no Inductor), so the densities are
those of this very input.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import fx

from mpass.backend import apply_passes, compile_rest, kernel_details
from mpass.debug import open_trace
from mpass.files import write_whole
from mpass.graph.nodes import shape_of, value_of
from mpass.graph.printing import count_ops, readable
from mpass.inspection.decisions import decision_as_dict
from mpass.inspection.outline import outline
from mpass.inspection.provenance import Provenance, describe
from mpass.inspection.results import ExplanationFields, GraphBreak, GraphExplanation, SiteCost
from mpass.inspection.tables import explanation_lines, explanation_table, render_explanation
from mpass.inspection.text_table import as_html
from mpass.lowering.recorder import Log, record
from mpass.options import Options, parse_options
from mpass.patterns.base import HEAD_DIM, LENGTH, Pattern, find_pattern
from mpass.plan import AttentionPlan, Skip


@dataclass(frozen=True)
class Explanation(ExplanationFields):
    """What became of a model: `print` it, read its fields, or `save` it as JSON or HTML."""

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write `.html` as a page, anything else as JSON."""
        target = Path(path)
        if target.suffix == ".html":
            from mpass.inspection.page import build_page  # jinja2, compilers: only when asked

            write_whole(target, build_page(self))
        else:
            write_whole(target, json.dumps(self.as_dict(), indent=1, default=str) + "\n")

    def __str__(self) -> str:
        return render_explanation(self)

    def _repr_html_(self) -> str:
        return as_html(explanation_table(self), explanation_lines(self))


@dataclass(slots=True)
class Capture:
    """A backend that rewrites as `minference` does and keeps what it saw."""

    options: Options
    graphs: list[GraphExplanation] = field(default_factory=list)
    breaks: list[GraphBreak] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)

    def __call__(self, gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        before, captured = clone(gm), readable(gm)
        trace = open_trace(gm, self.options, kernel_details)
        report = apply_passes(gm, self.options, trace)
        sites = [decision.site.output.name for decision in trace.decisions]
        self.graphs.append(
            GraphExplanation(
                sites=report.sites,
                details=tuple(decision_as_dict(d) for d in trace.decisions),
                costs=tuple(predict_cost(decision) for decision in trace.decisions),
                ops_before=dict(count_ops(before)),
                ops_after=dict(count_ops(gm)),
                outline_before=outline(before, sites),
                outline_after=outline(gm, sites),
                captured=captured,
                rewritten=readable(gm),
                seconds=trace.seconds,
                mask_bytes=dropped_bytes(before, gm, trace.decisions),
            )
        )
        self.breaks += graph_breaks(gm)
        self.lengths.append(report.min_seq_len)
        return compile_rest(gm, example_inputs, self.options)


def explain(
    model: Callable[..., Any],
    *args: Any,
    options: Mapping[str, Any] | None = None,
    dynamic: bool | None = None,
    **kwargs: Any,
) -> Explanation:
    """Tell which attentions of a model become sparse on these inputs, which do not, and why.

    The model runs once, in the caller's gradient mode.

    model: a module or a function, not compiled.
    args: what it is called with, by position.
    options: those of `torch.compile(..., backend="minference")`.
    dynamic: the `dynamic` of torch.compile.
    kwargs: what it is called with, by keyword.

    Raises what the options raise.
    """
    capture = make_capture(options)
    log = run_captured(capture, model, args, kwargs, dynamic)
    return finish_explanation(model, capture, log, describe(model, options))


def make_capture(options: Mapping[str, Any] | None) -> Capture:
    """A capture that runs graphs in plain torch unless the options name an inner backend."""
    return Capture(parse_options(None, {"inner_backend": "eager", **(options or {})}))


def run_captured(
    capture: Capture,
    model: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    dynamic: bool | None,
    inspect: Callable[..., None] | None = None,
) -> Log:
    """Compile a model by a capture and run it once; `inspect` sees every sparse attention."""
    original = getattr(model, "_orig_mod", model)
    with uncompiled(original), record(inspect) as log:
        torch.compile(original, backend=capture, dynamic=dynamic)(*args, **kwargs)
    return log


@contextlib.contextmanager
def uncompiled(model: object) -> Iterator[None]:
    """A model without what `compile` made of its modules in place: it would run that instead."""
    modules = list(model.modules()) if isinstance(model, torch.nn.Module) else []
    held = [(each, each._compiled_call_impl) for each in modules if each._compiled_call_impl]
    for module, _ in held:
        module._compiled_call_impl = None
    try:
        yield
    finally:
        for module, compiled in held:
            module._compiled_call_impl = compiled


def finish_explanation(
    model: Callable[..., Any], capture: Capture, log: Log, provenance: Provenance = ()
) -> Explanation:
    """Join what was compiled with what ran.

    Sparse sites run in the order of their graphs, and each graph's in order, unless a graph runs
    twice or breaks; calls are therefore matched by layer where layers are known.
    """
    calls = list(log.calls)
    graphs = []
    for graph in capture.graphs:
        costs = []
        for site, cost in zip(graph.sites, graph.costs, strict=True):
            call = next((c for c in calls if c.layer == site.layer), None)
            if site.status == "sparse" and call is not None:
                calls.remove(call)
                cost = dataclasses.replace(
                    cost,
                    density=tuple(call.density.mean(0).tolist()),
                    lowering=call.lowering,
                    reason=call.reason,
                    index_bytes=call.index_bytes,
                )
            costs.append(cost)
        graphs.append(dataclasses.replace(graph, costs=tuple(costs)))
    original = getattr(model, "_orig_mod", model)
    name = getattr(original, "__name__", type(original).__name__)
    shortest = min(capture.lengths, default=capture.options.shortest)
    return Explanation(name, tuple(graphs), tuple(capture.breaks), shortest, provenance)


def clone(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy of a graph that later passes do not touch."""
    graph = fx.Graph()
    output = graph.graph_copy(gm.graph, {})
    if output is not None:
        graph.output(output)
    return fx.GraphModule(gm, graph)


def predict_cost(decision: AttentionPlan | Skip) -> SiteCost:
    """The cost of a site by its patterns' own formulas; dense costs 1.0 per head."""
    site = decision.site
    shapes = [shape_of(node) for node in (site.query, site.key)]
    if any(len(shape) != 4 for shape in shapes):
        return SiteCost(0, 0, ())
    num_queries, num_keys = (size_or_zero(shape[2]) for shape in shapes)
    if isinstance(decision, Skip):
        return SiteCost(num_queries, num_keys, (1.0,) * size_or_zero(shapes[0][1]))
    predicted = tuple(
        predicted_share(pattern, num_keys, site.head_dim) for pattern in decision.patterns
    )
    return SiteCost(num_queries, num_keys, predicted)


@functools.lru_cache(maxsize=4096)
def predicted_share(pattern: Pattern, num_keys: int, head_dim: int) -> float:
    """Work of a pattern over that of dense causal attention, by the formulas of both."""
    values = {LENGTH: num_keys, HEAD_DIM: head_dim}
    dense = find_pattern("dense")().cost().subs(values)
    return float(pattern.cost().subs(values) / dense)


def size_or_zero(size: int | torch.SymInt) -> int:
    """A size as a number: of a symbol, its value now (no guard is added)."""
    if isinstance(size, int):
        return size
    value = size.node.hint
    return int(value) if value is not None else 0


def dropped_bytes(
    before: fx.GraphModule, after: fx.GraphModule, decisions: Sequence[AttentionPlan | Skip]
) -> int:
    """Bytes of the largest [.., Nq, Nk] tensor of a sparse site that the rewrite removed."""
    lengths = {
        (cost.num_queries, cost.num_keys)
        for decision in decisions
        if isinstance(decision, AttentionPlan)
        for cost in [predict_cost(decision)]
    }
    kept = {node.name for node in after.graph.nodes}
    largest = 0
    for node in before.graph.nodes:
        value = value_of(node)
        if node.name in kept or not isinstance(value, torch.Tensor) or value.dim() < 2:
            continue
        sizes = [size_or_zero(size) for size in value.shape]
        if (sizes[-2], sizes[-1]) in lengths:
            numbers = 1
            for size in sizes:
                numbers *= size
            largest = max(largest, numbers * value.element_size())
    return largest


def graph_breaks(gm: fx.GraphModule) -> list[GraphBreak]:
    """Why Dynamo ended this graph, if it had to."""
    reason = getattr(gm, "compile_subgraph_reason", None)
    if reason is None or not reason.graph_break:
        return []
    frames = reason.user_stack
    source = f"{frames[-1].filename}:{frames[-1].lineno}, in {frames[-1].name}" if frames else ""
    return [GraphBreak(str(reason.reason).strip(), source)]
