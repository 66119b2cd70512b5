"""The same rewrite for a program of torch.export: `rewrite_exported(program, options)`.

An exported program has no guards, so a length that its ranges leave open is compared at run time,
in the op.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram

from mpass.backend import apply_passes, kernel_details
from mpass.debug import finish_trace, open_trace
from mpass.graph.nodes import value_of
from mpass.graph.printing import fake_result
from mpass.options import parse_options
from mpass.report import keep_report


def rewrite_exported(
    program: ExportedProgram, options: Mapping[str, Any] | None = None
) -> ExportedProgram:
    """A program with its attention made sparse; the one given is left as it is.

    options: our own keys, as in `torch.compile(..., backend="minference", options=...)`. The
    report is `mpass.last_report()`. The ops have Python bodies: the result runs where Python and
    mpass are. Raises UnknownOptionError, OptionValueError, UnknownPatternError,
    ConfigMismatchError.

    Rewritten while gradients are recorded, attention that depends on a parameter or an input that
    requires them stays dense: sparse attention has no backward.
    """
    parsed = parse_options(None, options)
    gm = copy.deepcopy(program.graph_module)
    trace = open_trace(gm, parsed, kernel_details)
    report = apply_passes(gm, parsed, trace, recorded_nodes(gm.graph))
    for node in gm.graph.nodes:
        if node.op in ("call_function", "call_method") and "val" not in node.meta:
            node.meta["val"] = fake_result(node)
    signature = copy.deepcopy(program.graph_signature)
    before, after = program.graph.output_node(), gm.graph.output_node()
    for old, new in zip(before.all_input_nodes, after.all_input_nodes, strict=True):
        signature.replace_all_uses(old.name, new.name)
    rewritten: ExportedProgram = program._update(gm, signature)
    finish_trace(trace)
    keep_report(report)
    return rewritten


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
