"""Why a mask was not proven, in words: the form of a term, and the ops and inputs behind it."""

from __future__ import annotations

import sympy
import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.nodes import example, given_name, is_tensor, op_name, source_line
from mpass.masks.expressions import HEAD, QUERY, Expr
from mpass.masks.reader import GraphReader

MOST_NODES = 64
"""Nodes behind a bias beyond which it is not looked for where its numbers come from."""


def describe(term: Expr, reader: GraphReader) -> str:
    """Why a term is of no known form, in words."""
    symbols = term.free_symbols
    if HEAD in symbols and not from_unread_op(term, reader):
        verb = "may differ" if term.atoms(AppliedUndef) else "differs"
        return f"mask {verb} per head: {explain_unknown(term, reader)}"
    steps = {sympy.expand(call.args[0]).coeff(QUERY) for call in term.atoms(sympy.floor)}
    chunks = {1 / step for step in steps if step.is_Rational and step.p == 1}
    if isinstance(term, sympy.Eq) and chunks:
        return f"chunked attention in chunks of {next(iter(chunks))} positions"
    if term.atoms(AppliedUndef):
        return f"mask is not proven: {explain_unknown(term, reader)}"
    return f"mask term {term} is neither causal, window nor padding"


def from_unread_op(term: Expr, reader: GraphReader) -> bool:
    """Whether an op without a meaning makes a term, so that nobody knows if heads differ."""
    nodes = [reader.sources[atom.func.__name__] for atom in term.atoms(AppliedUndef)]
    return any(node.op not in ("placeholder", "get_attr") for node in nodes)


def explain_added(expr: Expr, reader: GraphReader) -> str:
    """Why what is added to the scores is no mask, or not known to be one."""
    nodes = [reader.sources[atom.func.__name__] for atom in expr.atoms(AppliedUndef)]
    if not nodes:
        return f"additive bias, no mask: {explain_unknown(expr, reader)}"
    learned = [parameter for node in nodes if (parameter := parameter_behind(node)) is not None]
    if learned:
        names = dict.fromkeys(map(given_name, learned))
        return f"a learned bias is added, which is no mask: {', '.join(names)}"
    return f"what is added is not known to be a mask: {explain_unknown(expr, reader)}"


def parameter_behind(node: fx.Node) -> fx.Node | None:
    """A parameter of the model that alone gives a tensor its numbers; None if there are others."""
    seen, pending = {node}, [node]
    found: fx.Node | None = None
    while pending:
        item = pending.pop()
        if item.op in ("placeholder", "get_attr") and is_tensor(item):
            if isinstance(example(item), torch.nn.Parameter):
                if found is not None:
                    return None  # Layers of the model, most likely: what they give is not learned.
                found = item
            elif example(item).dtype.is_floating_point:
                return None
        fresh = [given for given in item.all_input_nodes if given not in seen]
        if len(seen) > MOST_NODES:
            return None
        seen.update(fresh)
        pending += fresh
    return found


def explain_unknown(expr: Expr, reader: GraphReader) -> str:
    """The ops and inputs that an expression depends on and that could not be read."""
    parts = []
    for atom in sorted(expr.atoms(AppliedUndef), key=str):
        name = atom.func.__name__
        node = reader.sources[name]
        if node.op in ("placeholder", "get_attr"):
            parts.append(f"{given_name(node)} is an input whose values are unknown when compiling")
            continue
        place = source_line(node)
        failure = reader.failures.get(name, op_name(node))
        parts.append(f"{failure}" + (f" at {place}" if place else ""))
    return "; ".join(dict.fromkeys(parts)) or str(expr)
