"""Attention written out: matmul, scale, softcap, mask, softmax, cast, dropout, matmul.

Matching starts at a softmax and walks both ways. Backwards to the product of query and key, each op
must be one of the chain; forwards the weights must reach a product with the value. A softmax that
is between two products but not exactly this (its weights are returned, changed, dropped out) is a
site that stays dense with the reason; a softmax without them (a router's) is no attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sympy.core.function import AppliedUndef
from torch import fx

from mpass.mask import MaskProof, MaskProver
from mpass.mask_expr import axis, number
from mpass.mask_reader import op_name, same_view
from mpass.match.common import (
    constant_number,
    dropout_reason,
    gradient_reason,
    is_tensor,
    make_site,
    shape_reason,
)
from mpass.match.product import Product, bind_scores, bind_value, is_product, operands
from mpass.match.repeat import original, original_pair
from mpass.site import AttentionSite, example, shape_of

CASTS = frozenset("to type to_copy type_as float double half bfloat16 contiguous".split())
FACTORS = frozenset("mul multiply div divide truediv true_divide".split())
MASKS = frozenset("add sub subtract masked_fill where".split())
RESHAPES = frozenset("view reshape unsafe_view expand getitem".split())
DROPOUTS = frozenset({"dropout", "feature_dropout"})
OTHERS = frozenset({"nan_to_num", "clamp", "relu", "pow"})
MAX_STEPS = 16


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
class Weights:
    """The way from a softmax to the product with the value: its end, the operand, any problem."""

    output: fx.Node
    operand: fx.Node
    problem: str


@dataclass(frozen=True)
class Scores:
    """What a chain does to scores before they are masked; `masks` are the steps after."""

    scale: float
    softcap: float
    masks: list[tuple[fx.Node, fx.Node]]
    problem: str = ""


def match_eager(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The site around a softmax; None if the node is no softmax between two products."""
    if not is_softmax(node):
        return None
    chain = trace_scores(node, prover)
    if chain is None:
        return None
    weights = trace_weights(node, chain.sinks is not None)
    if weights is None:
        return None
    first = bind_scores(chain.product)
    second = bind_value(weights.output, weights.operand)
    problem = chain.problem or weights.problem or shape_problem(chain)
    if problem or first is None or second is None:
        return dense_site(chain, weights, problem or "the products are not of [B, H, N, D] tensors")
    return build_site(chain, weights.output, first, second, prover)


def build_site(
    chain: Chain, output: fx.Node, first: Product, second: Product, prover: MaskProver
) -> AttentionSite:
    """The site of a chain between two bound products."""
    query = original(first.left, output, prover, first.left_order)
    key, value = original_pair(
        first.right, second.right, output, prover, first.right_order, second.right_order
    )
    scores = read_scores(chain)
    sinks = None if chain.sinks is None else sink_logits(chain.sinks, chain.softmax, prover)
    reason = (
        shape_reason(query, key, value)
        or scores.problem
        or ("sinks are not one number per head" if chain.sinks and sinks is None else "")
        or other_readers(chain)
        or written_late((query, key, value), chain.product, output, prover)
        or gradient_reason(output)
    )
    proof = MaskProof(None, "not read: the site stays dense")
    if not reason:
        proof = prover.prove_steps(scores.masks, query, key, chain.softmax)
    return make_site(
        output,
        "eager",
        query=query,
        key=key,
        value=value,
        scale=scores.scale,
        softcap=scores.softcap,
        sinks=sinks,
        mask=proof.meaning,
        unproven=proof.reason,
        output_transposed=second.output_transposed,
        dense_reason=reason,
    )


def dense_site(chain: Chain, weights: Weights, reason: str) -> AttentionSite:
    """A site that can only stay as it is."""
    query, key = operands(chain.product)
    value = next(node for node in operands(weights.output) if node is not weights.operand)
    return make_site(
        weights.output,
        "eager",
        query=query,
        key=key,
        value=value,
        scale=1.0,
        mask=None,
        unproven=reason,
        dense_reason=reason,
    )


# -- softmax ----------------------------------------------------------------------------------


def is_softmax(node: fx.Node) -> bool:
    """Whether a node is a softmax over the last dimension."""
    if node.op not in ("call_function", "call_method") or op_name(node) != "softmax":
        return False
    if not is_tensor(node) or not isinstance(node.args[0], fx.Node):
        return False
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    return dim in (-1, len(shape_of(node)) - 1)


# -- from the softmax back to the product -----------------------------------------------------


def trace_scores(softmax: fx.Node, prover: MaskProver) -> Chain | None:
    """The chain that leads to a softmax, or None if it does not start at a product."""
    steps: list[tuple[fx.Node, fx.Node]] = []
    sinks: fx.Node | None = None
    path = {softmax}
    problem = ""
    reader: fx.Node = softmax
    found: Any = softmax.args[0]
    for _ in range(MAX_STEPS):
        if not isinstance(found, fx.Node) or not is_tensor(found):
            return None
        node, late = as_read_by(found, reader, prover)
        problem = problem or late
        path |= {found, node}
        if is_product(node):
            return Chain(softmax, node, steps[::-1], sinks, path, alibi_reason(node) or problem)
        name = op_name(node)
        reader = node
        if name == "cat" and sinks is None and is_pair(node):
            parts: Any = node.args[0]
            found, sinks = parts
            changed = [op_name(op) for op, _ in steps if op_name(op) not in CASTS]
            if changed:
                problem = problem or f"scores are changed by {changed[0]} beside attention sinks"
            steps = []
            continue
        maximum = own_maximum(node) if name == "sub" else None
        if maximum:
            path |= maximum
            found = node.args[0]
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
    parts = cat.args[0]
    dim = cat.args[1] if len(cat.args) > 1 else cat.kwargs.get("dim", 0)
    last = dim in (-1, len(shape_of(cat)) - 1)
    return last and isinstance(parts, (list, tuple)) and len(parts) == 2


def misuse(op: fx.Node, carried: fx.Node) -> str:
    """Why an op does more to the scores than scale, cap or mask them; "" if it does not."""
    name = op_name(op)
    if name not in CASTS | FACTORS | MASKS | {"tanh"}:
        verb = "reshaped" if name in RESHAPES else "changed"
        return f"scores are {verb} by {name} before the softmax"
    if sum(arg is carried for arg in (*op.args, *op.kwargs.values())) != 1:
        return f"scores are used twice by {name}"
    places = {"where": (0, 2) if op.op == "call_method" else (1, 2), "add": (0, 1)}
    if op.args.index(carried) not in places.get(name, (0, 1) if name in FACTORS else (0,)):
        return f"scores are not the operand that {name} masks"
    if name in ("add", "sub", "subtract") and (len(op.args) > 2 or "alpha" in op.kwargs):
        return f"scores are scaled by {name}"
    if name in CASTS and not example(op).dtype.is_floating_point:
        return f"scores are rounded to {example(op).dtype}"
    return ""


def shape_problem(chain: Chain) -> str:
    """Why a mask does not merely broadcast to the scores."""
    shape = [*map(number, shape_of(chain.product))]
    for op, _ in chain.steps:
        if [*map(number, shape_of(op))] != shape:
            return f"scores are broadcast by {op_name(op)}"
    return ""


def as_read_by(node: fx.Node, reader: fx.Node, prover: MaskProver) -> tuple[fx.Node, str]:
    """The op that made what `reader` sees of a tensor: an in-place op may have followed."""
    write = prover.writes.last_write(node, prover.writes.position[reader])
    if write is None or write is node:
        return node, ""
    if is_tensor(write) and same_view(node, write.args[0]):
        return write, ""
    return node, "scores are written in place"


def carrying_argument(node: fx.Node) -> fx.Node | None:
    """The argument through which scores reach an op: the one that leads to a product."""
    if node.op not in ("call_function", "call_method"):
        return None
    candidates = [arg for arg in node.args if isinstance(arg, fx.Node) and is_tensor(arg)]
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
    scores, node = sub.args[0], sub.args[1]
    nodes: set[fx.Node] = set()
    if isinstance(node, fx.Node) and op_name(node) in ("getitem", "values"):
        nodes.add(node)
        if node.args[1] not in (0, "values"):
            return set()
        node = node.args[0]
    if not isinstance(node, fx.Node) or op_name(node) not in ("max", "amax"):
        return set()
    dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    keep = node.args[2] if len(node.args) > 2 else node.kwargs.get("keepdim")
    own = node.args[0] is scores and dim in (-1, [-1], (-1,)) and keep is True
    return {*nodes, node} if own else set()


def alibi_reason(product: fx.Node) -> str:
    """Why a product that adds a bias keeps a site dense."""
    if op_name(product) == "baddbmm" and product.kwargs.get("beta", 1) != 0:
        return "baddbmm adds a bias (ALiBi) to the scores: only masks can be served"
    return ""


def read_scores(chain: Chain) -> Scores:
    """Scale and softcap of a chain: factors, then `cap * tanh(x / cap)`, then masks."""
    before, cap, capped = 1.0, 1.0, False
    masks: list[tuple[fx.Node, fx.Node]] = []
    for op, carried in chain.steps:
        name = op_name(op)
        if name in CASTS:
            masks.append((op, carried))
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
            if capped:
                cap *= factor
            else:
                before *= factor
    if not capped:
        return Scores(before, 0.0, masks)
    if cap <= 0:
        return Scores(before, 0.0, masks, f"softcap of {cap}")
    return Scores(before * cap, cap, masks)


def constant_factor(op: fx.Node, carried: fx.Node) -> float | None:
    """The number that an op multiplies the scores by."""
    left, right = op.args[0], op.args[1]
    other = constant_number(right if left is carried else left)
    if other is None or len(op.args) > 2:
        return None
    if op.kwargs.get("rounding_mode") is not None:
        return None
    if op_name(op) in ("mul", "multiply"):
        return other
    return 1.0 / other if left is carried and other else None


def sink_logits(sinks: fx.Node, softmax: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The [H] tensor behind sinks of [B, H, Nq, 1]; None if they are something else."""
    expr = prover.reader.read(sinks, softmax)
    if not isinstance(expr, AppliedUndef) or expr.args not in ((axis(1),), ()):
        return None
    node = prover.reader.sources[expr.func.__name__]
    if len(shape_of(node)) != 1 or prover.writes.ever_written(node):
        return None
    return node


def other_readers(chain: Chain) -> str:
    """Why the scores must exist anyway: something outside of the chain reads them."""
    for node in chain.path - {chain.softmax}:
        for user in node.users:
            if user not in chain.path:
                return f"attention scores are also read by {user.name}"
    return ""


def written_late(
    tensors: tuple[fx.Node, ...], product: fx.Node, output: fx.Node, prover: MaskProver
) -> str:
    """Why query, key or value cannot be read at the output: they change before it."""
    for node in tensors:
        if node in prover.writes.position and prover.writes.written_between(node, product, output):
            return f"{node.name} is written in place before the output"
    return ""


# -- from the softmax on to the product with the value ----------------------------------------


def trace_weights(softmax: fx.Node, sinks: bool) -> Weights | None:
    """The way from a softmax to a product with the value; None if there is none."""
    node, problem = softmax, ""
    for _ in range(MAX_STEPS):
        following = next((user for user in node.users if continues(user, node, MAX_STEPS)), None)
        if following is None:
            return None
        if len(node.users) > 1:
            problem = problem or "attention weights are read more than once (or returned)"
        name = op_name(following)
        if is_product(following):
            if sinks:
                problem = problem or "attention sinks are not cut off the weights"
            return Weights(following, node, problem)
        if name in DROPOUTS:
            problem = problem or dropout_in(following)
        elif sinks and name == "getitem" and cuts_last(following):
            sinks = False
        elif name not in CASTS:
            problem = problem or f"attention weights are changed by {name}"
        node = following
    return None


def continues(user: fx.Node, weights: fx.Node, depth: int) -> bool:
    """Whether an op leads on from the weights to a product with the value."""
    if is_product(user):
        return weights in operands(user)
    known = CASTS | FACTORS | MASKS | RESHAPES | DROPOUTS | OTHERS
    if depth == 0 or user.op not in ("call_function", "call_method") or op_name(user) not in known:
        return False
    if not is_tensor(user) or len(shape_of(user)) < 3:
        return False
    return any(continues(following, user, depth - 1) for following in user.users)


def dropout_in(node: fx.Node) -> str:
    """Why a dropout op keeps a site dense."""

    def argument(place: int, *names: str, default: Any = None) -> Any:
        if len(node.args) > place:
            return node.args[place]
        return next((node.kwargs[name] for name in names if name in node.kwargs), default)

    if argument(2, "training", "train", default=True) is False:
        return ""
    return dropout_reason(argument(1, "p", default=0.5))


def cuts_last(node: fx.Node) -> bool:
    """Whether an op is x[..., :-1]."""
    index = node.args[1]
    if not isinstance(index, (list, tuple)):
        return False
    *others, last = index
    whole = all(item is Ellipsis or item == slice(None) for item in others)
    full = len(index) == 4 or Ellipsis in others
    return whole and full and last == slice(None, -1, None)
