"""Attention sinks that are put on the output: `output * sigmoid(logsumexp(scores) - sink)`.

A sink of logit t beside the scores s of a row takes exp(t) / (exp(t) + sum exp(s)) of its weight.
What is left to the keys is sigmoid(logsumexp(s) - t) times their softmax: the same attention, in
the words of models whose kernels return log-sum-exps (Granite's sliding windows).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mpass.graph.arguments import argument, bind, place_of, tensor_arguments
from mpass.graph.nodes import is_tensor, op_name, shape_of
from mpass.match.eager_scores import CASTS, Chain
from mpass.match.eager_weights import Weights

STEPS = 8
"""Most ops between the log-sum-exp and the product with the output."""


@dataclass(frozen=True)
class SinkGate:
    """A gate on the output: the gated output, the sinks [.., H, ..], the ops that read the scores.

    nodes: these ops, from the log-sum-exp to the gate; nothing else reads them.
    """

    output: fx.Node
    sinks: fx.Node
    nodes: frozenset[fx.Node]


def sink_gate(chain: Chain, weights: Weights) -> SinkGate | None:
    """The gate that makes sinks of an attention without any; None where there is none."""
    scores = argument(chain.softmax, "input")
    if chain.sinks is not None or not isinstance(scores, fx.Node) or len(shape_of(scores)) != 4:
        return None
    sums = [user for user in scores.users if is_sum(user)]
    if len(sums) != 1:
        return None
    node, sinks, is_gate = sums[0], None, False
    nodes = {node}
    for _ in range(STEPS):
        if len(node.users) != 1:
            return None
        (user,) = node.users
        name = op_name(user)
        if not is_tensor(user):
            return None
        if name in ("sub", "subtract") and sinks is None:
            given = bind(user)
            sinks = given.get("other")
            if place_of(user, node) != "input" or given.keys() - {"input", "other"}:
                return None
            # Of fewer dimensions their second one would meet another one of the log-sum-exps.
            if not isinstance(sinks, fx.Node) or not is_tensor(sinks):
                return None
            if len(shape_of(sinks)) != len(shape_of(node)):
                return None
        elif name == "sigmoid" and sinks is not None and not is_gate:
            is_gate = True
        elif name == "mul" and is_gate:
            return finished(user, node, weights, sinks, nodes)
        elif not (name in CASTS or is_new_last(user, node)):
            return None
        nodes.add(user)
        node = user
    return None


def finished(
    product: fx.Node, gate: fx.Node, weights: Weights, sinks: object, nodes: set[fx.Node]
) -> SinkGate | None:
    """The gate of a product, if that is of the attention's output and one number per row."""
    others = [arg for arg in tensor_arguments(product) if arg is not gate]
    output = weights.output
    alike = shape_of(product) == shape_of(output) and shape_of(gate)[-1:] == (1,)
    if others != [output] or list(output.users) != [product] or not alike:
        return None
    if len(shape_of(gate)) != 4 or not isinstance(sinks, fx.Node) or not is_tensor(sinks):
        return None
    return SinkGate(product, sinks, frozenset(nodes))


def is_sum(node: fx.Node) -> bool:
    """Whether a node is the log-sum-exp over the keys."""
    if op_name(node) != "logsumexp":
        return False
    return argument(node, "dim") in (-1, (-1,), [-1])


def is_new_last(node: fx.Node, given: fx.Node) -> bool:
    """Whether an op puts a dimension of one after the others."""
    if op_name(node) == "unsqueeze":
        return argument(node, "dim") == -1
    if op_name(node) != "getitem":
        return False
    index = argument(node, "index")
    new = isinstance(index, tuple) and index[-1:] == (None,) and index.count(None) == 1
    whole = new and all(item in (Ellipsis, slice(None), None) for item in index)
    return whole and len(shape_of(node)) == len(shape_of(given)) + 1
