"""The torch.compile backend: `torch.compile(model, backend="minference")`.

Dynamo's graph is rewritten first and then given to Inductor: every decision stands in the graph's
ops and their arguments, so Inductor's caches see it (a late pass would not run on a cache hit).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import fx

from mpass.debug import Trace, close_trace, finish_trace, open_trace
from mpass.lowering.kernel_sources import KernelSource
from mpass.match import find_attention, inline_subgraphs
from mpass.options import Options, parse_options
from mpass.plan import AttentionPlan, plan_attention
from mpass.report import Report, keep_report, make_report
from mpass.rewrite import rewrite_attention
from mpass.warm_up import start_kernels


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
    parsed = parse_options(mode, options)
    trace = open_trace(gm, parsed, kernel_details)
    report = apply_passes(gm, parsed, trace)
    compiled = compile_rest(gm, example_inputs, parsed)
    trace.mark("inner compiler")
    finish_trace(trace)
    # Only now: Dynamo may restart the analysis from inside of the inner compiler.
    keep_report(report)
    return compiled


def apply_passes(gm: fx.GraphModule, options: Options, trace: Trace) -> Report:
    """The passes in order: inline, match, plan, rewrite. Edits `gm`; returns what was done."""
    inline_subgraphs(gm)
    sites = find_attention(gm)
    trace.mark("match")
    decisions = [plan_attention(site, options) for site in sites]
    trace.mark("plan")
    plans = [plan for plan in decisions if isinstance(plan, AttentionPlan)]
    start_kernels(plans)
    rewrite_attention(gm, plans)
    trace.mark("rewrite")
    report = make_report(decisions, options.shortest)
    close_trace(trace, gm, decisions, report, options)
    return report


def compile_rest(
    gm: fx.GraphModule, example_inputs: Sequence[Any], options: Options
) -> Callable[..., Any]:
    """Hand the rewritten graph to the inner compiler."""
    if options.inner_backend == "eager":
        return gm.forward
    if options.inner_backend == "inductor":
        from torch._inductor.compile_fx import compile_fx

        compiled: Any = compile_fx(gm, list(example_inputs), config_patches=dict(options.inductor))
    else:
        compiled = torch._dynamo.lookup_backend(options.inner_backend)(gm, list(example_inputs))
    return compiled


def kernel_details(kernel: KernelSource) -> tuple[tuple[str, str], ...]:
    """What a kernel was made for and what its compiler says of it, for the debug folder.

    The compilers are imported when the first kernel is asked about.
    """
    from mpass.inspection.kernels import kernel_details as ask_compilers

    return ask_compilers(kernel)
