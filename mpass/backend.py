"""The torch.compile backend: `torch.compile(model, backend="minference")`.

Dynamo's graph is rewritten first and then given to Inductor: every decision stands in the graph's
ops and their arguments, so Inductor's caches see it (a late pass would not run on a cache hit).
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import fx

from mpass import lowering, patterns
from mpass.config.model_check import check_model
from mpass.debug import Trace, close_trace, finish_trace, open_trace
from mpass.errors import ModuleTypeError
from mpass.failures import contain
from mpass.graph.linear_layers import (
    halve_linear_layers,
    hasten_linear_layers,
    narrow_linear_layers,
    widen_linear_layers,
)
from mpass.graph.observation import shared_observations
from mpass.graph.printing import count_ops
from mpass.graph.site import AttentionSite
from mpass.graph.snapshot import snapshot
from mpass.lowering.activity import activity
from mpass.lowering.denoising import identified
from mpass.lowering.kernel_sources import KernelSource
from mpass.lowering.recorder import tell_watcher
from mpass.match import find_attention, inline_subgraphs, open_calls
from mpass.match.common import training_allowed
from mpass.options import BACKENDS_OF_TORCH, Options, parse_options
from mpass.plan import AttentionPlan, Skip, plan_attention
from mpass.report import Report, int8_notes, make_report
from mpass.rewrite import rewrite_attention
from mpass.story.graphs import keep_graph
from mpass.story.limits import watch_limits
from mpass.story.nothing import watch_for_nothing
from mpass.validation import validate_sites
from mpass.warm_up import start_kernels

M = TypeVar("M", bound=torch.nn.Module)

watch_for_nothing()


def minference(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile a Dynamo graph with its attention made sparse.

    mode, options: as given to torch.compile; see mpass.options.Options for our keys. Raises
    UnknownOptionError, OptionValueError, UnknownPatternError and ConfigMismatchError before
    anything is compiled (Dynamo shows them inside of its BackendCompilerFailed).
    """
    watch_limits()
    tell_watcher()
    parsed = parse_options(mode, options)
    trace = open_trace(gm, parsed, kernel_details)
    report = apply_passes(gm, parsed, trace)
    with activity().stage(parsed.inner_backend.capitalize()):
        compiled = compile_rest(gm, example_inputs, parsed)
    trace.mark("inner compiler")
    finish_trace(trace)
    if parsed.denoising:
        compiled = identified(compiled)
    # Only now: Dynamo may restart the analysis from inside of the inner compiler.
    keep_graph(report, parsed)
    return compiled


def compile(
    model: M,
    *,
    mode: str | None = None,
    dynamic: bool | None = None,
    fullgraph: bool = False,
    **options: Any,
) -> M:
    """Compile a module in place with `backend="minference"`, its options checked at once.

    The same as `model.compile(backend="minference", options=options)`, which sees a wrong option
    when the model first runs. In place: `model.generate`, pipelines and trainers run the compiled
    model, where `torch.compile(model)` would leave `generate` to the uncompiled one.

    model: any module; returned, so that calls can be chained.
    mode, dynamic, fullgraph: as torch.compile has them.
    options: the keys of mpass.options.Options, and Inductor's.

    Raises ModuleTypeError, UnknownOptionError, OptionValueError, UnknownPatternError,
    ConfigFileError and, for a config that names layers or heads that the model does not have,
    ConfigMismatchError.
    """
    if not isinstance(model, torch.nn.Module):
        raise ModuleTypeError(model)
    check_model(parse_options(mode, options).sparse_config, model)
    # torch.compile takes either a mode or options: a mode stands for options of Inductor's.
    chosen = {**(torch._inductor.list_mode_options().get(mode or "") or {}), **options}
    model.compile(backend="minference", options=chosen, dynamic=dynamic, fullgraph=fullgraph)
    return model


def apply_passes(
    gm: fx.GraphModule, options: Options, trace: Trace, recorded: Collection[fx.Node] = ()
) -> Report:
    """The passes in order: inline, open, match, plan, validate, rewrite. They edit `gm`.

    recorded: nodes that gradients may be asked for, though their values do not say so. A failure
    of ours keeps one attention dense, or else leaves the whole graph as it was.
    """
    original = snapshot(gm.graph)
    sites: list[AttentionSite] = []
    notes: tuple[str, ...] = ()
    try:
        with shared_observations(), training_allowed(options.training == "sparse"):
            inline_subgraphs(gm)
            opened = open_calls(gm.graph)
            sites = [with_gradients(site, recorded) for site in find_attention(gm)]
            trace.mark("match")
            decisions = [plan_or_skip(gm, site, options) for site in sites]
            trace.mark("plan")
            decisions = validate_sites(gm, decisions, options.validate)
            trace.mark("validate")
            start_kernels([plan for plan in decisions if isinstance(plan, AttentionPlan)])
            decisions = rewrite_attention(gm, decisions, opened)
            if options.linear == "int8":
                notes = narrow_linear_layers(gm)
            elif options.linear == "half":
                notes = halve_linear_layers(gm)
            elif options.linear == "fp32":
                notes = widen_linear_layers(gm)
            elif options.linear == "auto" and options.inner_backend in BACKENDS_OF_TORCH:
                notes = hasten_linear_layers(gm)
            if options.attention == "int8":
                notes = (*notes, *int8_notes(decisions))
            trace.mark("rewrite")
    except Exception as error:
        reason = contain(error, "rewriting a graph", count_ops(gm))
        decisions = [Skip(site, site.dense_reason or reason) for site in sites]
        gm.graph = original.restored()
        gm.recompile()
    report = dataclasses.replace(make_report(decisions, options.shortest), notes=notes)
    close_trace(trace, gm, decisions, report, options)
    return report


def plan_or_skip(gm: fx.GraphModule, site: AttentionSite, options: Options) -> AttentionPlan | Skip:
    """The decision about one site; dense if planning fails."""
    try:
        return plan_attention(site, options)
    except Exception as error:
        return Skip(site, contain(error, "planning attention", count_ops(gm)))


def with_gradients(site: AttentionSite, recorded: Collection[fx.Node]) -> AttentionSite:
    """The site, dense where gradients may be asked for."""
    if site.dense_reason or site.output not in recorded:
        return site
    reason = "gradients are recorded: rewrite the program under torch.no_grad()"
    return dataclasses.replace(site, dense_reason=reason)


def compile_rest(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """Hand the rewritten graph to the inner compiler."""
    if options.inner_backend == "eager":
        return gm.forward
    if options.inner_backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        # Inductor's caches know our ops by name: what they are is said beside.
        config: Any = torch.compiler.config
        with config.patch(cache_key_tag=f"{config.cache_key_tag} mpass {code_digest()}"):
            patches = dict(options.inductor)
            compiled: Any = compile_fx(gm, list(example_inputs), config_patches=patches)
    else:
        compiled = torch._dynamo.lookup_backend(options.inner_backend)(gm, list(example_inputs))
    return compiled


@functools.cache
def code_digest() -> str:
    """Of the code that says what our ops are and how large their results.

    A compiled graph holds sizes of results, so that one of another version must not be used.
    """
    digest = hashlib.sha256()
    for package in (lowering, patterns):
        for path in sorted(Path(package.__path__[0]).rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def kernel_details(kernel: KernelSource) -> tuple[tuple[str, str], ...]:
    """What a kernel was made for and what its compiler says of it, for the debug folder.

    The compilers are imported when the first kernel is asked about.
    """
    from mpass.inspection.kernels import kernel_details as ask_compilers

    return ask_compilers(kernel)
