"""Eager attention from the product of query and key to the softmax: scale, softcap, sinks, masks.

The walk goes backwards from the softmax. Each op must be one of the chain, or it is the problem
that keeps the site dense.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.arguments import argument, bind, place_of, subject, tensor_arguments
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.masks.elements import is_one, same_view
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
from mpass.match.score_factors import (
    NOT_CONSTANT,
    constant_factor,
    factor_problem,
    product_factor,
)

CASTS = frozenset("to type to_copy type_as float double half bfloat16 contiguous".split())
FACTORS = frozenset("mul multiply div divide truediv true_divide".split())
MASKS = frozenset("add sub subtract masked_fill where".split())
FOLDS = frozenset("view reshape unsafe_view flatten unflatten".split())
RESHAPES = FOLDS | {"expand", "getitem"}
FLOORS = frozenset("max maximum clamp clamp_min clip".split())
MAX_STEPS = 16

LAYERS = frozenset("linear layer_norm rms_norm group_norm batch_norm embedding softmax".split())
"""Ops that make other tensors than scores of scores, whatever the shapes are."""

LOWEST = -1e30
"""Scores that are not less than a number this low are the scores themselves."""

OPERANDS = frozenset({"input", "other", "condition", "mask", "value"})
"""Arguments that ops on scores may have; any other (alpha, out) makes them another op."""

PLACES = {"where": ("input", "other"), "add": ("input", "other")}
"""The arguments that may carry the scores, where these are not just the first."""

RANKS = "scores have {} dimensions: [B, H, Nq, Nk] and [B*H, Nq, Nk] are served"

JOINED = "scores are joined with others by cat: one number per row, a sink, is served"

AFTER_THE_MASK = "scores are changed by {} after a mask or a bias"

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
    factors: numbers by which ops among the masks multiply the scores, and with them what hides.
    """

    scale: float
    softcap: float
    masks: list[tuple[fx.Node, fx.Node]]
    problem: str = ""
    bias: KeyBias | None = None
    factors: dict[fx.Node, float] = field(default_factory=dict)


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
            if not is_one(shape_of(sinks)[-1]):
                problem = problem or JOINED
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
        problem = problem or misuse(node, carried, prover)
        steps.append((node, carried))
        found = carried
    return None


def is_pair(cat: fx.Node) -> bool:
    """Whether torch.cat joins two tensors along the last dimension."""
    parts, dim = argument(cat, "tensors"), argument(cat, "dim", 0)
    last = dim in (-1, len(shape_of(cat)) - 1)
    return last and isinstance(parts, (list, tuple)) and len(parts) == 2


def misuse(op: fx.Node, carried: fx.Node, prover: MaskProver) -> str:
    """Why an op does more to the scores than scale, cap or mask them; "" if it does not."""
    name = op_name(op)
    if is_fold(op, carried) or is_floor(op, carried, prover):
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
    odd = sorted(extra for extra in given.keys() - OPERANDS if given[extra] is not None)
    if name not in CASTS and odd:
        return f"{odd[0]} of {name} is not understood on scores"
    return ""


def is_floor(op: fx.Node, carried: fx.Node, prover: MaskProver) -> bool:
    """Whether an op makes scores that are less than the lowest number of their dtype that number.

    It stands after a mask, so that two of them do not add up to minus infinity.
    """
    given = bind(op)
    name = op_name(op)
    if name not in FLOORS or given.get("input") is not carried or example(op).dtype not in FLOATS:
        return False
    place = {"max": "dim", "maximum": "other"}.get(name, "min")  # max(a, b) has no dim
    if any(given[extra] is not None for extra in given.keys() - {"input", "other", place}):
        return False
    floor = given.get("other", given.get(place))
    if isinstance(floor, fx.Node):
        read = prover.reader.read(floor, op) if is_tensor(floor) else None
    else:
        read = constant_number(floor) if name != "max" else None
    if read is None or not sympy.sympify(read).is_number:
        return False
    return float(read) <= max(LOWEST, torch.finfo(example(op).dtype).min)


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
        if len(shape_of(op)) not in (3, 4):
            return RANKS.format(len(shape_of(op)))
        *leading, queries, keys = map(number, shape_of(op))
        expected = four if len(leading) == 2 else rows
        if [queries, keys] != sizes or [*map(sympy.expand, leading)] != expected:
            return f"scores are broadcast or reshaped by {op_name(op)}"
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
    return next((arg for arg in full if leads_to_product(arg)), None)


def leads_to_product(node: fx.Node) -> bool:
    """Whether ops that may be done to scores lead from a product to a tensor."""
    seen: set[fx.Node] = set()
    level = [node]
    for _ in range(MAX_STEPS + 1):
        if any(map(is_product, level)):
            return True
        seen.update(level)
        behind = (arg for op in level for arg in arguments_of_step(op) if arg not in seen)
        level = list(dict.fromkeys(behind))
    return False


def arguments_of_step(op: fx.Node) -> list[fx.Node]:
    """The tensors of which an op may be a step on the scores.

    An op that no chain may hold is one if it leaves the last two dimensions as they are: such an
    attention stays dense, but it is seen.
    """
    if op.op not in ("call_function", "call_method") or op_name(op) in LAYERS:
        return []
    tensors = [arg for arg in op.all_input_nodes if is_tensor(arg)]
    if op_name(op) in CASTS | FACTORS | MASKS | RESHAPES | {"tanh", "cat"}:
        return tensors
    if not is_tensor(op) or len(shape_of(op)) < 3:
        return []
    size = [*map(number, shape_of(op)[-2:])]
    return [arg for arg in tensors if [*map(number, shape_of(arg)[-2:])] == size]


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

    A bias per key may stand before a factor, which is then the bias's as well, and so may masks
    where the factor is positive.
    """
    masks: list[tuple[fx.Node, fx.Node]] = []
    factors: dict[fx.Node, float] = {}
    factor = product_factor(chain.product)
    bias, problem = bias_of_product(chain.product, prover)
    if factor is None or problem:
        return Scores(1.0, 0.0, masks, problem or NOT_CONSTANT)
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
        elif name in MASKS | FLOORS:
            masks.append((op, carried))
        elif name == "tanh":
            if capped or is_masked(masks):
                told = "two tanh on the scores" if capped else AFTER_THE_MASK.format(name)
                return Scores(before, 0.0, masks, told)
            capped = True
        else:
            factor = constant_factor(op, carried)
            if factor is None:
                return Scores(before, 0.0, masks, factor_problem(op, carried))
            if is_masked(masks):
                if not 0 < factor < math.inf:
                    return Scores(before, 0.0, masks, AFTER_THE_MASK.format(name))
                factors[op] = factor
                masks.append((op, carried))
            if bias is not None:
                bias = KeyBias(bias.node, bias.factor * factor)
            if capped:
                cap *= factor
            else:
                before *= factor
    if not capped:
        return Scores(before, 0.0, masks, bias=bias, factors=factors)
    if bias is not None:
        return Scores(before, 0.0, masks, CAPPED_BIAS)
    if cap <= 0:
        return Scores(before, 0.0, masks, f"softcap of {cap}")
    return Scores(before * cap, cap, masks, factors=factors)


def is_masked(steps: Iterable[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether a mask is among some steps."""
    return any(op_name(op) in MASKS for op, _ in steps)


def is_scaled_later(op: fx.Node, carried: fx.Node, chain: Chain, prover: MaskProver) -> bool:
    """Whether an op adds a bias per key, and what comes after it scales the scores."""
    if not is_key_bias(added(op, carried), shape_of(op), prover):
        return False
    place = [step for step, _ in chain.steps].index(op)
    return any(op_name(step) in FACTORS for step, _ in chain.steps[place + 1 :])
