"""The same rewrite for a program of torch.export: `rewrite_exported(program, options)`.

An exported program has no guards, so a length that its ranges leave open is compared at run time,
in the op.
"""

from __future__ import annotations

import copy
import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload
from torch.export import ExportedProgram
from torch.fx.experimental.proxy_tensor import make_fx

from mpass.backend import apply_passes, kernel_details
from mpass.debug import finish_trace, open_trace
from mpass.failures import contain
from mpass.graph.nodes import value_of
from mpass.graph.printing import count_ops, fake_result
from mpass.options import parse_options
from mpass.report import Report
from mpass.story.graphs import keep_graph


def rewrite_exported(
    program: ExportedProgram, options: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """Make the attention of a program of torch.export sparse; the one given is left as it is.

    The report is `mpass.last_report()`. The ops have Python bodies: the result runs where Python
    and mpass are. Rewritten while gradients are recorded, attention that depends on a parameter or
    an input that requires them stays dense: sparse attention has no backward.

    program: what torch.export gave.
    options: our own keys, as in `torch.compile(..., backend="minference", options=...)`.

    Raises UnknownOptionError, OptionValueError, UnknownPatternError and ConfigMismatchError.
    """
    parsed = parse_options(None, options)
    gm = copy.deepcopy(program.graph_module)
    trace = open_trace(gm, parsed, kernel_details)
    report = apply_passes(gm, parsed, trace, recorded_nodes(gm.graph))
    try:
        rewritten = with_graph(program, gm)
    except Exception as error:
        reason = contain(error, "rewriting an exported program", count_ops(gm))
        sites = tuple(
            dataclasses.replace(s, status="dense", reason=s.reason or reason, patterns=())
            for s in report.sites
        )
        report, rewritten = Report(sites, report.min_seq_len), copy.deepcopy(program)
    finish_trace(trace)
    keep_graph(report)
    return rewritten


def with_graph(program: ExportedProgram, gm: fx.GraphModule) -> ExportedProgram:
    """The program with another graph of the same inputs and outputs."""
    for node in list(gm.graph.nodes):
        if node.op in ("call_function", "call_method"):
            if "val" not in node.meta:
                value = value_of(node)
                node.meta["val"] = fake_result(node) if value is None else value
            if is_lowered(node):
                lower_call(gm.graph, node)
    gm.recompile()
    signature = copy.deepcopy(program.graph_signature)
    before, after = program.graph.output_node(), gm.graph.output_node()
    for old, new in zip(before.all_input_nodes, after.all_input_nodes, strict=True):
        signature.replace_all_uses(old.name, new.name)
    rewritten: ExportedProgram = program._update(gm, signature)
    return rewritten


def is_lowered(node: fx.Node) -> bool:
    """Whether a call that makes a tensor is none of those that an exported program may hold."""
    if not isinstance(value_of(node), torch.Tensor):
        return False
    source = node.args[0] if node.args else None
    if node.target is operator.getitem and not (
        isinstance(source, fx.Node) and isinstance(value_of(source), torch.Tensor)
    ):
        return False
    return not isinstance(node.target, (OpOverload, HigherOrderOperator))


def lower_call(graph: fx.Graph, node: fx.Node) -> None:
    """Replace a call of torch's Python functions by the registered ops that it runs."""
    inputs = node.all_input_nodes

    def run(*values: Any) -> Any:
        given = dict(zip(inputs, values, strict=True))
        args: Any = fx.map_arg(node.args, given.__getitem__)
        kwargs: Any = fx.map_arg(node.kwargs, given.__getitem__)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        return node.target(*args, **kwargs)  # type: ignore[operator]

    traced = make_fx(run)(*map(value_of, inputs))
    if any(inner.op == "get_attr" for inner in traced.graph.nodes):
        raise NotImplementedError(f"{node.target} makes a constant")
    places = [inner for inner in traced.graph.nodes if inner.op == "placeholder"]
    copies: dict[fx.Node, fx.Node] = dict(zip(places, inputs, strict=True))
    for inner in traced.graph.nodes:
        if inner.op == "call_function":
            with graph.inserting_before(node):
                copies[inner] = graph.node_copy(inner, copies.__getitem__)
    returned: Any = traced.graph.output_node().args[0]
    result = copies[returned]
    node.replace_all_uses_with(result)
    graph.erase_node(node)


def recorded_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that gradients may be asked for: exported graphs only say it of their inputs."""
    found: set[fx.Node] = set()
    if not torch.is_grad_enabled():
        return found
    for node in graph.nodes:
        value = value_of(node)
        asked = isinstance(value, torch.Tensor) and value.requires_grad
        if (node.op == "placeholder" and asked) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found
