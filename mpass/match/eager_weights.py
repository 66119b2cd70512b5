"""Eager attention from the softmax to the product with the value."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mpass.graph.arguments import argument, bind
from mpass.graph.dead_code import is_unread
from mpass.graph.nodes import is_tensor, op_name, shape_of
from mpass.masks.expressions import number
from mpass.match.common import dropout_reason
from mpass.match.eager_scores import (
    CASTS,
    FACTORS,
    LAYERS,
    MASKS,
    MAX_STEPS,
    RESHAPES,
    is_fold,
)
from mpass.match.products import is_product, operands

DROPOUTS = frozenset({"dropout", "feature_dropout"})


@dataclass(frozen=True)
class Weights:
    """The way from a softmax to the product with the value: its end, the operand, any problem.

    steps: the ops on the way.
    """

    output: fx.Node
    operand: fx.Node
    problem: str
    steps: tuple[fx.Node, ...] = ()


def trace_weights(softmax: fx.Node, sinks: bool) -> Weights | None:
    """The way from a softmax to a product with the value; None if there is none."""
    node, problem = softmax, ""
    steps: list[fx.Node] = []
    for _ in range(MAX_STEPS):
        following = next((user for user in node.users if continues(user, node)), None)
        if following is None:
            return None
        if any(user is not following and not is_unread(user) for user in node.users):
            problem = problem or "attention weights are read more than once (or returned)"
        name = op_name(following)
        if is_product(following):
            if sinks:
                problem = problem or "attention sinks are not cut off the weights"
            return Weights(following, node, problem, tuple(steps))
        if name in DROPOUTS:
            problem = problem or dropout_in(following)
        elif sinks and name == "getitem" and cuts_last(following):
            sinks = False
        elif name not in CASTS and not is_fold(following, node):
            problem = problem or f"attention weights are changed by {name}"
        node = following
        steps.append(node)
    return None


def continues(user: fx.Node, weights: fx.Node) -> bool:
    """Whether an op leads on from the weights to a product with the value.

    As with scores, any op that leaves the last two dimensions as they are may stand between.
    """
    level, seen = [(user, weights)], {user}
    for _ in range(MAX_STEPS + 1):
        following: list[tuple[fx.Node, fx.Node]] = []
        for op, given in level:
            if is_product(op):
                if given in operands(op):
                    return True
            elif may_change_weights(op, given):
                following += [(reader, op) for reader in op.users if reader not in seen]
        seen.update(reader for reader, _ in following)
        level = following
    return False


def may_change_weights(op: fx.Node, weights: fx.Node) -> bool:
    """Whether an op may be a step on the weights: one that is known, or one of their shape."""
    if op.op not in ("call_function", "call_method") or op_name(op) in LAYERS:
        return False
    if not is_tensor(op) or len(shape_of(op)) < 3:
        return False
    if op_name(op) in CASTS | FACTORS | MASKS | RESHAPES | DROPOUTS:
        return True
    sizes = [[*map(number, shape_of(node)[-2:])] for node in (op, weights)]
    return sizes[0] == sizes[1]


def dropout_in(node: fx.Node) -> str:
    """Why a dropout op keeps a site dense."""
    given = bind(node)
    if given.get("train", True) is False:
        return ""
    return dropout_reason(given.get("p", 0.5))


def cuts_last(node: fx.Node) -> bool:
    """Whether an op is x[..., :-1]."""
    index = argument(node, "index")
    if not isinstance(index, (list, tuple)):
        return False
    *others, last = index
    whole = all(item is Ellipsis or item == slice(None) for item in others)
    full = len(index) == 4 or Ellipsis in others
    return whole and full and last == slice(None, -1, None)
