"""The mask of attention that is written out as one tensor, which is read at run time.

It is the tensor that is added to the scores where that is all that is done to them; else new nodes
make one, of what is added and of what says which scores a low number replaces.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.arguments import bind, tensor_arguments
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.masks.conjuncts import visible
from mpass.masks.prover import MaskProver
from mpass.match.common import FLOATS, constant_number, new_node, readable_mask
from mpass.match.eager_scores import CASTS, FOLDS
from mpass.match.folds import readable

ABSORBING = -1e30
"""A number this low plus a score is the number itself, in fp32 and bf16."""

REPLACING = ("masked_fill", "where")

Step = tuple[fx.Node, fx.Node]
"""An op on the scores, and its argument that carries them."""


def added_mask(
    steps: Sequence[Step], query: fx.Node, key: fx.Node, before: fx.Node, prover: MaskProver
) -> fx.Node | None:
    """The tensor that is added to the scores; None where another thing is done to them.

    New nodes are put at `before`, and are dead until a rewrite reads them.
    """
    others = [(op, carried) for op, carried in steps if op_name(op) not in CASTS | FOLDS]
    if len(others) == 1 and op_name(others[0][0]) == "add":
        op, carried = others[0]
        mask = addend(op, carried)
        if mask is None or not readable(mask, len(shape_of(op)) == 3):
            return None
        return readable_mask(mask, query, key, prover.writes)
    if len(others) == 1 and op_name(others[0][0]) in REPLACING:
        found = replaced_scores(*others[0], prover)
        if found is None or readable_mask(found[0], query, key, prover.writes) is None:
            return None
        return all_steps(others, before, prover)
    joined = all_steps(others, before, prover) if len(others) > 1 else None
    return None if joined is None else readable_mask(joined, query, key, prover.writes)


def all_steps(steps: Sequence[Step], before: fx.Node, prover: MaskProver) -> fx.Node | None:
    """What the steps make of scores of zero, by new nodes; None where that is no mask of others.

    It is one where each step adds, or replaces scores by a number so low that a score added to it
    gives that very number: else a row without keys would have other weights.
    """
    parts: list[tuple[fx.Node, bool, float]] = []
    for op, carried in steps:
        if len(shape_of(op)) != 4 or example(op).dtype == torch.float16:
            return None
        found = replaced_scores(op, carried, prover)
        mask = addend(op, carried) if op_name(op) == "add" else None
        if found is not None:
            parts.append(found)
            continue
        if mask is None or not may_be_mask(mask, op, prover):
            return None
        parts.append((mask, False, 0.0))
    aten = torch.ops.aten
    joined: fx.Node | None = None
    for mask, kept, lowest in parts:
        if lowest == 0.0:
            joined = mask if joined is None else new_node(before, aten.add.Tensor, joined, mask)
            continue
        hidden = new_node(before, aten.logical_not.default, mask) if kept else mask
        if joined is None:
            zeros = new_node(before, aten.zeros_like.default, mask, dtype=torch.float32)
            joined = new_node(before, aten.masked_fill.Scalar, zeros, hidden, lowest)
        else:
            low = new_node(before, aten.full_like.default, joined, lowest)
            joined = new_node(before, aten.where.self, hidden, low, joined)
    return joined


def may_be_mask(mask: fx.Node, op: fx.Node, prover: MaskProver) -> bool:
    """Whether what an op adds may be a mask: it is proven to be one, or nothing is known of it.

    A bias that the graph computes is none, and is not worth reading.
    """
    if prover.writes.ever_written(mask) or example(mask).dtype == torch.float16:
        return False
    read = prover.reader.read(mask, op)
    sources = [prover.reader.sources[atom.func.__name__] for atom in read.atoms(AppliedUndef)]
    given = bool(sources) and all(node.op in ("placeholder", "get_attr") for node in sources)
    return given or visible(read) is not None


def addend(op: fx.Node, carried: fx.Node) -> fx.Node | None:
    """The tensor of numbers that an op adds to the scores."""
    mask = next((node for node in tensor_arguments(op) if node is not carried), None)
    return mask if mask is not None and example(mask).dtype in FLOATS else None


def replaced_scores(
    op: fx.Node, carried: fx.Node, prover: MaskProver
) -> tuple[fx.Node, bool, float] | None:
    """What tells which scores a low number replaces, whether it tells of those that stay; and it.

    None for other ops, and for a number that is not low enough.
    """
    if op_name(op) not in REPLACING:
        return None
    given = bind(op)
    filled = op_name(op) == "masked_fill"
    condition = given.get("mask" if filled else "condition")
    other = given.get("value" if filled else "other")
    if isinstance(other, fx.Node) and is_tensor(other):
        read = prover.reader.read(other, op)
        lowest = float(read) if read.is_number else None
    else:
        lowest = constant_number(other)
    if given.get("input") is not carried or lowest is None or lowest > ABSORBING:
        return None
    if not isinstance(condition, fx.Node) or not is_tensor(condition):
        return None
    if example(condition).dtype != torch.bool or prover.writes.ever_written(condition):
        return None
    return condition, not filled, lowest
