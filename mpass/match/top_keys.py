"""Masks that keep the best keys of each query: the top-k inside of the mask that SDPA is given.

transformers' Doge writes `masked_fill(x, scatter(zeros, -1, topk(x, w).indices, 1) == 0, min)`,
where x has a number per key, with what may not be seen hidden.
"""

from __future__ import annotations

import torch
from torch import fx

from mpass.graph.arguments import argument, bind, tensor_arguments
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.graph.site import AttentionSite, KeptKeys
from mpass.graph.sizes import agree
from mpass.lowering.dispatch import device_lowering
from mpass.masks.prover import MaskProver
from mpass.masks.scores import ROUNDS_SCORES_OFF
from mpass.match.common import constant_number

KEPT_SHORTEST = 512
"""Keys from which it pays to skip those that a model's own mask leaves out (docs/training.md)."""

ZEROS = frozenset({"zeros", "zeros_like", "new_zeros"})


def kept_keys(op: fx.Node, carried: fx.Node, prover: MaskProver) -> KeptKeys | None:
    """What an op keeps that hides all but the best keys of each row of `carried`; None if not that.

    carried: the tensor [.., Nq, Nk] that the op hides keys of. Nothing may write to any of them.
    """
    if op_name(op) != "masked_fill":
        return None
    hidden = constant_number(argument(op, "value"))
    active = compared_with_zero(argument(op, "mask"))
    if hidden is None or hidden > ROUNDS_SCORES_OFF or active is None:
        return None
    if op_name(active) != "scatter" or not is_last(active) or "reduce" in bind(active):
        return None
    marks, indices = argument(active, "input"), argument(active, "index")
    value = constant_number(bind(active).get("value", bind(active).get("src")))
    if value != 1.0 or not is_zeros(marks) or not isinstance(indices, fx.Node):
        return None
    best = topk_of_indices(indices)
    if best is None or argument(best, "input") is not carried or not is_last(best):
        return None
    keep = argument(best, "k")
    if argument(best, "largest", True) is not True or not isinstance(keep, int) or keep < 1:
        return None
    if not same_sizes(marks, carried) or any(
        prover.writes.ever_written(node) for node in (carried, marks, active, indices, best)
    ):
        return None
    return KeptKeys(keep, hidden)


def compared_with_zero(condition: object) -> fx.Node | None:
    """The tensor whose zeros a condition finds."""
    if not isinstance(condition, fx.Node) or op_name(condition) != "eq":
        return None
    tensors = list(tensor_arguments(condition))
    others = [value for value in bind(condition).values() if value not in tensors]
    if len(tensors) != 1 or [constant_number(other) for other in others] != [0.0]:
        return None
    return tensors[0]


def is_zeros(node: object) -> bool:
    """Whether a tensor is made of zeros."""
    return isinstance(node, fx.Node) and is_tensor(node) and op_name(node) in ZEROS


def topk_of_indices(indices: fx.Node) -> fx.Node | None:
    """The topk whose indices a node is."""
    if op_name(indices) == "getitem":
        source, place = indices.args
    elif op_name(indices) in ("getattr", "indices") and len(indices.args) > 1:
        source, place = indices.args[0], 1 if indices.args[1] == "indices" else None
    else:
        return None
    found = isinstance(source, fx.Node) and op_name(source) == "topk" and place == 1
    return source if found and isinstance(source, fx.Node) else None


def is_last(op: fx.Node) -> bool:
    """Whether an op works along the last dimension; topk does unless it is told another one."""
    rank = len(shape_of(argument(op, "input")))
    return argument(op, "dim", -1) in (-1, rank - 1)


def same_sizes(one: object, other: fx.Node) -> bool:
    """Whether two tensors are of one shape."""
    if not isinstance(one, fx.Node):
        return False
    sizes = shape_of(one), shape_of(other)
    return len(sizes[0]) == len(sizes[1]) and all(map(agree, *sizes))


def kept_reason(site: AttentionSite) -> str:
    """Why a site whose model chooses keys itself stays dense, or the empty string."""
    if site.kept is None or site.key_bias is None:
        return ""
    if example(site.key_bias).dtype in (torch.bfloat16, torch.float16):
        return "the best keys are chosen by numbers of few digits, of which many are equal"
    if not device_lowering(example(site.query).device).decides_by_cost:
        return "the best keys of each query are found by the host: on CPUs only"
    return ""
