"""Biases on the scores that depend on the distance of key and query: T5's, ALiBi both ways.

What is added is walked backwards through what hides keys to a tensor that is a function of the
distance (mpass.masks.distances); what hides keys is proven as it is of scores.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mpass.graph.arguments import bind, tensor_arguments
from mpass.graph.new_nodes import nodes_between
from mpass.graph.nodes import example, op_name, shape_of
from mpass.graph.site import MaskMeaning
from mpass.graph.sizes import agree
from mpass.masks.conjuncts import visible
from mpass.masks.distance_rules import distance_rule
from mpass.masks.distances import DistanceReader, NoLineError
from mpass.masks.elements import is_one
from mpass.masks.expressions import number
from mpass.masks.prover import MaskProof, MaskProver
from mpass.masks.reader import GraphReader
from mpass.masks.scores import ROUNDS_SCORES_OFF
from mpass.match.common import FLOATS
from mpass.match.eager_scores import CASTS
from mpass.match.key_bias import added

MAX_STEPS = 8

Step = tuple[fx.Node, fx.Node]
"""An op, and its argument that carries what it is done to."""


@dataclass(frozen=True)
class DistanceBias:
    """A bias by distance: the node of its line, and the steps that hide keys of what is added."""

    line: fx.Node
    steps: tuple[Step, ...]


def distance_bias(
    added: fx.Node | None, at: fx.Node, query: fx.Node, key: fx.Node, prover: MaskProver
) -> DistanceBias | None:
    """The bias by distance in a tensor that `at` adds to scores, and what is done to it; or None.

    The scores are those of query [B, H, Nq, D] and key [B, Hk, Nk, D].
    """
    steps: list[Step] = []
    node, reader = added, at
    for _ in range(MAX_STEPS):
        if node is None or not 2 <= len(shape_of(node)) <= 4:
            return None
        if prover.writes.ever_written(node) or example(node).dtype not in FLOATS:
            return None
        line = line_of(node, reader, query, key, prover)
        if line is not None:
            return DistanceBias(line, tuple(steps[::-1]))
        carried = carried_bias(node, prover)
        if carried is None or len(shape_of(node)) != 4:
            return None
        steps.append((node, carried))
        node, reader = carried, node
    return None


def line_of(
    node: fx.Node, at: fx.Node, query: fx.Node, key: fx.Node, prover: MaskProver
) -> fx.Node | None:
    """The line of a tensor, the same for all attentions of one size; None if it has none."""
    sizes = (*shape_of(query)[1:3], shape_of(key)[2])
    memo = (node, *map(number, sizes))
    if memo not in prover.lines:
        prover.lines[memo] = None
        try:
            prover.lines[memo] = bias_line(node, at, query, key, prover.reader)
        except NoLineError:
            pass
    return prover.lines[memo]


def bias_line(
    bias: fx.Node, at: fx.Node, query: fx.Node, key: fx.Node, reader: GraphReader
) -> fx.Node:
    """The line [H or 1, L] of a bias, made by new nodes right after it.

    bias: [1, H or 1, Nq, Nk], or with fewer leading dimensions, as the node `at` reads it, for
    attention of query [B, H, Nq, D] and key [B, Hk, Nk, D]. Raises NoLineError where it is not
    known to be a function of the distance.
    """
    heads, num_queries = shape_of(query)[1:3]
    num_keys, shape = shape_of(key)[2], shape_of(bias)
    if len(shape) < 2 or not (agree(shape[-2], num_queries) and agree(shape[-1], num_keys)):
        raise NoLineError
    if reader.writes.ever_written(bias):
        raise NoLineError
    sizes = (number(num_queries), number(num_keys))
    distances = DistanceReader(reader, distance_rule, bias.next, *sizes, example(query))
    found = distances.line(bias, at)
    if (found.query, found.key) != (-2, -1):
        raise NoLineError
    last = bias.next.prev
    try:
        made = found.build(sympy.Integer(0))
        leading = list(shape_of(made)[:-2])
        own = leading[-1:] or [1]
        if any(not is_one(size) for size in leading[:-1]) or own[0] not in (1, heads):
            raise NoLineError
        return distances.call(torch.ops.aten.reshape.default, made, [own[0], -1])
    except Exception as error:
        for node in reversed(nodes_between(last, distances.before)):
            bias.graph.erase_node(node)
        raise NoLineError from error


def carried_bias(op: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The argument through which a bias reaches what an op makes of it, in its own dtype."""
    name = op_name(op)
    if op.op not in ("call_function", "call_method"):
        return None
    carried: object = None
    if name in CASTS | {"masked_fill", "where"}:
        carried = bind(op).get("input")
    elif name == "add":
        unread = [n for n in tensor_arguments(op) if visible(prover.reader.read(n, op)) is None]
        carried = unread[0] if len(unread) == 1 else None
    same = isinstance(carried, fx.Node) and example(carried).dtype == example(op).dtype
    return carried if same and isinstance(carried, fx.Node) else None


def split_distance(
    steps: Sequence[Step], query: fx.Node, key: fx.Node, prover: MaskProver
) -> tuple[DistanceBias | None, list[Step]]:
    """The bias by distance that one of the steps on scores adds, and all the steps that hide keys.

    None where no step adds one, or several do.
    """
    found: DistanceBias | None = None
    others: list[Step] = []
    for op, carried in steps:
        node = added(op, carried)
        read = None if node is None else prover.reader.read(node, op)
        bias = None
        if node is not None and visible(read) is None and len(shape_of(op)) == 4:
            bias = distance_bias(node, op, query, key, prover)
        if bias is None:
            others.append((op, carried))
        elif found is not None:
            return None, list(steps)
        else:
            found = bias
            others += bias.steps
    return found, others


def with_distance(proof: MaskProof) -> MaskProof:
    """A proof that tells of the bias as well, given up where rows without keys would be others.

    Such rows are the mean of all values where what hides keys leaves nothing of score and bias.
    """
    meaning = proof.meaning
    if meaning is None:
        return proof
    if meaning.mean_of_hidden and any(one > ROUNDS_SCORES_OFF for one in proof.hidden):
        return dataclasses.replace(proof, meaning=None, reason=NO_KEYS_BY_DISTANCE)
    words = "a bias by distance is added to the scores"
    told: MaskMeaning = dataclasses.replace(meaning, proof=(*meaning.proof, words))
    return dataclasses.replace(proof, meaning=told)


NO_KEYS_BY_DISTANCE = "rows that see no key have a bias by distance: hide keys by -inf"
