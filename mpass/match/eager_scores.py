"""Eager attention from the product of query and key to the softmax: scale, softcap, sinks, masks.

The walk goes backwards from the softmax. Each op must be one of the chain, or it is the problem
that keeps the site dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.arguments import argument, bind, place_of, subject, tensor_arguments
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.masks.elements import same_view
from mpass.masks.expressions import number
from mpass.masks.prover import MaskProver
from mpass.match.common import constant_number
from mpass.match.key_bias import (
    CAPPED_BIAS,
    TWO_BIASES,
    KeyBias,
    added,
    bias_of_product,
    is_key_bias,
)
from mpass.match.products import is_product

CASTS = frozenset("to type to_copy type_as float double half bfloat16 contiguous".split())
FACTORS = frozenset("mul multiply div divide truediv true_divide".split())
MASKS = frozenset("add sub subtract masked_fill where".split())
FOLDS = frozenset("view reshape unsafe_view flatten unflatten".split())
RESHAPES = FOLDS | {"expand", "getitem"}
MAX_STEPS = 16

OPERANDS = frozenset({"input", "other", "condition", "mask", "value"})
"""Arguments that ops on scores may have; any other (alpha, out) makes them another op."""

PLACES = {"where": ("input", "other"), "add": ("input", "other")}
"""The arguments that may carry the scores, where these are not just the first."""

FLOATS = frozenset({torch.float64, torch.float32, torch.bfloat16, torch.float16})
"""dtypes that scores and weights may have on their way."""


@dataclass
class Chain:
    """The ops from a product of query and key to a softmax, in their order.

    steps: (op, its argument that carries the scores). sinks: logits put beside the scores. path:
    all nodes that belong to the chain. problem: why it is not exactly attention.
    """

    softmax: fx.Node
    product: fx.Node
    steps: list[tuple[fx.Node, fx.Node]]
    sinks: fx.Node | None
    path: set[fx.Node]
    problem: str


@dataclass(frozen=True)
class Scores:
    """What a chain does to scores before they are masked; `masks` are the steps after.

    bias: what the product adds, or an op before a factor; among the masks there may be another.
    """

    scale: float
    softcap: float
    masks: list[tuple[fx.Node, fx.Node]]
    problem: str = ""
    bias: KeyBias | None = None


def trace_scores(softmax: fx.Node, prover: MaskProver) -> Chain | None:
    """The chain that leads to a softmax, or None if it does not start at a product."""
    steps: list[tuple[fx.Node, fx.Node]] = []
    sinks: fx.Node | None = None
    path = {softmax}
    problem = ""
    reader: fx.Node = softmax
    found: Any = argument(softmax, "input")
    for _ in range(MAX_STEPS):
        if not isinstance(found, fx.Node) or not is_tensor(found):
            return None
        node, late = as_read_by(found, reader, prover)
        problem = problem or late
        path |= {found, node}
        if is_product(node):
            return Chain(softmax, node, steps[::-1], sinks, path, problem)
        name = op_name(node)
        reader = node
        if name == "cat" and sinks is None and is_pair(node):
            found, sinks = argument(node, "tensors")
            changed = [op_name(op) for op, _ in steps if op_name(op) not in CASTS]
            if changed:
                problem = problem or f"scores are changed by {changed[0]} beside attention sinks"
            steps = []
            continue
        maximum = own_maximum(node) if name == "sub" else None
        if maximum:
            path |= maximum
            found = argument(node, "input")
            if sinks is not None or any(op_name(op) == "tanh" for op, _ in steps):
                problem = problem or "the maximum of the scores is subtracted before sinks or tanh"
            continue
        carried = carrying_argument(node)
        if carried is None:
            return None
        problem = problem or misuse(node, carried)
        steps.append((node, carried))
        found = carried
    return None


def is_pair(cat: fx.Node) -> bool:
    """Whether torch.cat joins two tensors along the last dimension."""
    parts, dim = argument(cat, "tensors"), argument(cat, "dim", 0)
    last = dim in (-1, len(shape_of(cat)) - 1)
    return last and isinstance(parts, (list, tuple)) and len(parts) == 2


def misuse(op: fx.Node, carried: fx.Node) -> str:
    """Why an op does more to the scores than scale, cap or mask them; "" if it does not."""
    name = op_name(op)
    if is_fold(op, carried):
        return ""
    if name not in CASTS | FACTORS | MASKS | {"tanh"}:
        verb = "reshaped" if name in RESHAPES else "changed"
        return f"scores are {verb} by {name} before the softmax"
    if sum(tensor is carried for tensor in tensor_arguments(op)) != 1:
        return f"scores are used twice by {name}"
    given = bind(op)
    place = place_of(op, carried)
    if place not in PLACES.get(name, ("input", "other") if name in FACTORS else ("input",)):
        return f"scores are not the operand that {name} masks"
    if name not in CASTS and any(given[extra] is not None for extra in given.keys() - OPERANDS):
        return f"scores are scaled by {name}"
    return ""


def is_fold(op: fx.Node, carried: fx.Node) -> bool:
    """Whether an op makes [B, H, Nq, Nk] of [B*H, Nq, Nk], or the other way round."""
    if op_name(op) not in FOLDS or subject(op) is not carried:
        return False
    new, old = shape_of(op), shape_of(carried)
    return {len(new), len(old)} == {3, 4} and [*map(number, new[-2:])] == [*map(number, old[-2:])]


def fold_of(chain: Chain, operand: fx.Node) -> tuple[Any, Any] | None:
    """B and H of the scores that a chain or the weights see as [B, H, Nq, Nk]; None if none do."""
    for node in (chain.product, *(op for op, _ in chain.steps), chain.softmax, operand):
        if len(shape_of(node)) == 4:
            batch, heads = shape_of(node)[:2]
            return batch, heads
    return None


def precision_problem(product: fx.Node, steps: Iterable[fx.Node]) -> str:
    """Why the steps between two products are of another precision than attention has.

    Sparse attention keeps scores and weights in fp32. A step that rounds no more than the product
    itself does is within the tolerance of its dtype; one that rounds more is another result.
    """
    own = torch.finfo(example(product).dtype)
    for op in steps:
        dtype = example(op).dtype
        if dtype not in FLOATS:
            return f"scores or weights are rounded to {dtype}"
        if torch.finfo(dtype).eps > own.eps or torch.finfo(dtype).max < own.max:
            return f"scores of {example(product).dtype} are rounded to {dtype}"
    return ""


def shape_problem(chain: Chain, operand: fx.Node) -> str:
    """Why a mask does not merely broadcast to the scores, whether heads are folded or not.

    operand: the weights that the value is multiplied by.
    """
    sizes = [*map(number, shape_of(chain.product)[-2:])]
    fold = fold_of(chain, operand)
    four = None if fold is None else [*map(number, fold)]
    rows = [sympy.expand(math.prod(four or [number(shape_of(chain.product)[0])]))]
    for op in (chain.product, *(op for op, _ in chain.steps), operand):
        *leading, queries, keys = map(number, shape_of(op))
        expected = four if len(leading) == 2 else rows
        if [queries, keys] != sizes or [*map(sympy.expand, leading)] != expected:
            return f"scores are broadcast by {op_name(op)}"
    return ""


def as_read_by(node: fx.Node, reader: fx.Node, prover: MaskProver) -> tuple[fx.Node, str]:
    """The op that made what `reader` sees of a tensor: an in-place op may have followed."""
    write = prover.writes.last_write(node, prover.writes.position[reader])
    if write is None or write is node:
        return node, ""
    if is_tensor(write) and same_view(node, subject(write)):
        return write, ""
    return node, "scores are written in place"


def carrying_argument(node: fx.Node) -> fx.Node | None:
    """The argument through which scores reach an op: the one that leads to a product."""
    if node.op not in ("call_function", "call_method"):
        return None
    candidates = list(tensor_arguments(node))
    shape = shape_of(node)
    full = [arg for arg in candidates if shape_of(arg)[-1:] == shape[-1:]] or candidates
    leading = [arg for arg in full if leads_to_product(arg, MAX_STEPS)]
    return leading[0] if leading else None


def leads_to_product(node: fx.Node, depth: int) -> bool:
    """Whether a chain of elementwise ops starts at a product."""
    if is_product(node):
        return True
    known = CASTS | FACTORS | MASKS | RESHAPES | {"tanh", "cat"}
    if depth == 0 or node.op not in ("call_function", "call_method") or op_name(node) not in known:
        return False
    return any(leads_to_product(arg, depth - 1) for arg in node.all_input_nodes if is_tensor(arg))


def own_maximum(sub: fx.Node) -> set[fx.Node]:
    """The nodes of x.max(-1, keepdim=True) in `x - max`, which a softmax does not notice."""
    given = bind(sub)
    if given.keys() - {"input", "other"}:
        return set()
    scores, node = given.get("input"), given.get("other")
    nodes: set[fx.Node] = set()
    if isinstance(node, fx.Node) and op_name(node) in ("getitem", "values"):
        nodes.add(node)
        if node.target is not getattr and argument(node, "index") != 0:
            return set()
        node = subject(node)
    if not isinstance(node, fx.Node) or op_name(node) not in ("max", "amax"):
        return set()
    given = bind(node)
    last = given.get("dim") in (-1, [-1], (-1,))
    own = given.get("input") is scores and last and given.get("keepdim") is True
    return {*nodes, node} if own else set()


def read_scores(chain: Chain, prover: MaskProver) -> Scores:
    """Scale and softcap of a chain: factors, then `cap * tanh(x / cap)`, then masks.

    A bias per key may stand before a factor, which is then the bias's as well.
    """
    masks: list[tuple[fx.Node, fx.Node]] = []
    factor = product_factor(chain.product)
    bias, problem = bias_of_product(chain.product, prover)
    if factor is None or problem:
        return Scores(1.0, 0.0, masks, problem or "scores are scaled by what is not a constant")
    before, cap, capped = factor, 1.0, False
    for op, carried in chain.steps:
        name = op_name(op)
        if name in CASTS | FOLDS:
            masks.append((op, carried))
        elif is_scaled_later(op, carried, chain, prover):
            if bias is not None or capped:
                return Scores(before, 0.0, masks, CAPPED_BIAS if capped else TWO_BIASES)
            node = added(op, carried)
            assert node is not None
            bias = KeyBias(node)
        elif name in MASKS:
            masks.append((op, carried))
        elif any(op_name(mask) in MASKS for mask, _ in masks):
            return Scores(before, 0.0, masks, f"scores are changed by {name} after the mask")
        elif name == "tanh":
            if capped:
                return Scores(before, 0.0, masks, "two tanh on the scores")
            capped = True
        else:
            factor = constant_factor(op, carried)
            if factor is None:
                return Scores(before, 0.0, masks, "scores are scaled by what is not a constant")
            if bias is not None:
                bias = KeyBias(bias.node, bias.factor * factor)
            if capped:
                cap *= factor
            else:
                before *= factor
    if not capped:
        return Scores(before, 0.0, masks, bias=bias)
    if bias is not None:
        return Scores(before, 0.0, masks, CAPPED_BIAS)
    if cap <= 0:
        return Scores(before, 0.0, masks, f"softcap of {cap}")
    return Scores(before * cap, cap, masks)


def is_scaled_later(op: fx.Node, carried: fx.Node, chain: Chain, prover: MaskProver) -> bool:
    """Whether an op adds a bias per key, and what comes after it scales the scores."""
    if not is_key_bias(added(op, carried), shape_of(op), prover):
        return False
    place = [step for step, _ in chain.steps].index(op)
    return any(op_name(step) in FACTORS for step, _ in chain.steps[place + 1 :])


def product_factor(product: fx.Node) -> float | None:
    """The number that a product is scaled by itself: baddbmm's alpha."""
    if op_name(product) != "baddbmm":
        return 1.0
    return constant_number(argument(product, "alpha", 1))


def constant_factor(op: fx.Node, carried: fx.Node) -> float | None:
    """The number that an op multiplies the scores by."""
    given = bind(op)
    if any(given[extra] is not None for extra in given.keys() - {"input", "other"}):
        return None
    divided = given.get("input") is carried
    other = constant_number(given.get("other") if divided else given.get("input"))
    if other is None:
        return None
    if op_name(op) in ("mul", "multiply"):
        return other
    return 1.0 / other if divided and other else None
