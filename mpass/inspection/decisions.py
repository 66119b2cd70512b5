"""One matched attention in words: what it reads, what its mask means, and what was decided."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.nodes import example
from mpass.graph.site import MaskMeaning
from mpass.inspection.text_table import patterns_of_heads
from mpass.plan import AttentionPlan, Skip
from mpass.report import pattern_names


def decision_as_text(decision: AttentionPlan | Skip) -> str:
    """A site and its decision as lines `name: value`."""
    values = decision_as_dict(decision)
    proof = values.pop("proof")
    head = f"{values.pop('path') or values['node']}, layer {values.pop('layer')}"
    lines = [head, *(f"  {name}: {value}" for name, value in values.items() if value != "")]
    return "\n".join([*lines, *(f"    because {line}" for line in proof)])


def decision_as_dict(decision: AttentionPlan | Skip) -> dict[str, Any]:
    """A site and its decision, fit for JSON."""
    site = decision.site
    return {
        "path": site.path,
        "layer": site.layer,
        "source": site.source,
        "node": site.output.name,
        "spelling": site.spelling,
        "query": tensor_in_words(site.query),
        "key": tensor_in_words(site.key),
        "value": tensor_in_words(site.value),
        "scale": site.scale,
        "softcap": site.softcap,
        "decision": "dense" if isinstance(decision, Skip) else "sparse",
        "reason": decision.reason if isinstance(decision, Skip) else "",
        "patterns": ""
        if isinstance(decision, Skip)
        else patterns_of_heads(pattern_names(decision)),
        "patterns from": decision.config_source,
        "mask": str(mask_formula(site.mask)) if site.mask else "unproven",
        "proof": list(site.mask.proof) if site.mask else [site.unproven],
    }


def tensor_in_words(node: fx.Node) -> str:
    """`bfloat16 [1, 32, s0, 128] cpu`."""
    tensor = example(node)
    shape = ", ".join(str(size) for size in tensor.shape)
    return f"{str(tensor.dtype).removeprefix('torch.')} [{shape}] {tensor.device}"


def mask_formula(mask: MaskMeaning) -> sympy.Basic:
    """Which keys are visible as a sympy condition on query row q, key k and batch row b."""
    query, key, batch = sympy.symbols("q k b", integer=True, nonnegative=True)
    position = query + as_sympy(mask.query_offset)
    conditions: list[Any] = []
    if mask.causal:
        conditions.append(sympy.Le(key, position, evaluate=False))
    if mask.window:
        distance = position - key if mask.causal else sympy.Abs(position - key)
        conditions.append(sympy.Lt(distance, mask.window, evaluate=False))
    if mask.key_mask is not None:
        conditions.append(
            sympy.Eq(sympy.Function(mask.key_mask.name)(batch, key), 1, evaluate=False)
        )
    if mask.valid_keys is not None:
        conditions.append(sympy.Lt(key, as_sympy(mask.valid_keys), evaluate=False))
    return sympy.And(*conditions, evaluate=False) if conditions else sympy.true


def as_sympy(length: int | torch.SymInt | fx.Node) -> sympy.Expr:
    """A length as an expression; a node is a symbol of its name."""
    if isinstance(length, torch.SymInt):
        expression: sympy.Expr = length.node.expr
        return expression
    if isinstance(length, fx.Node):
        return sympy.Symbol(length.name, integer=True)
    return sympy.Integer(length)
