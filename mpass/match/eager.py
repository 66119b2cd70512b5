"""Attention written out: matmul, scale, softcap, mask, softmax, cast, dropout, matmul.

Matching starts at a softmax and walks both ways. Backwards to the product of query and key, each op
must be one of the chain; forwards the weights must reach a product with the value. A softmax that
is between two products but not exactly this (its weights are returned, changed, dropped out) is a
site that stays dense with the reason; a softmax without them (a router's) is no attention.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from sympy.core.function import AppliedUndef
from torch import fx

from mpass.graph.arguments import bind, place_of
from mpass.graph.dead_code import is_unread
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.graph.site import AttentionSite
from mpass.lowering.rows_before_keys import REPLACED, REPLACED_FIRST
from mpass.masks.expressions import axis
from mpass.masks.prover import MaskProof, MaskProver
from mpass.match.added_masks import added_mask
from mpass.match.common import (
    gradient_reason,
    make_site,
    new_node,
    shape_reason,
)
from mpass.match.distance_bias import split_distance, with_distance
from mpass.match.eager_scores import (
    MASKS,
    MAX_STEPS,
    Chain,
    Scores,
    fold_of,
    precision_problem,
    read_scores,
    shape_problem,
    trace_scores,
)
from mpass.match.eager_weights import Weights, trace_weights
from mpass.match.folds import (
    heads_behind,
    in_order,
    leading_sizes,
    unfolded,
    without_heads,
)
from mpass.match.key_bias import (
    CAPPED_BIAS,
    TWO_BIASES,
    KeyBias,
    added,
    first_row,
    hidden_ahead,
    split_bias,
    with_words,
)
from mpass.match.products import Product, bind_scores, bind_value, operands
from mpass.match.repeat_kv import made_from, original, original_pair
from mpass.match.sink_gates import SinkGate, sink_gate
from mpass.match.spelling import Spelling

SHAPED_AS = frozenset({"expand_as", "view_as", "reshape_as"})
"""Ops that make a tensor of the shape of another."""

NO_PRODUCTS = (
    "the products are not of [B, H, N, D] tensors, nor of [B*H, N, D]: expand or reshape them"
)

FROM_THE_RIGHT = "the weights are the right factor of their product, which sums over queries"

CHANGED_BY_THEMSELVES = "attention scores are also read by {}, whose result goes back into them"

NO_KEYS = "rows that see no key have a bias per key: hide keys by -inf, not a number"


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
    problem = (
        chain.problem
        or weights.problem
        or shape_problem(chain, weights.operand)
        or rounding(chain, weights)
    )
    if problem or first is None or second is None:
        return dense_site(chain, weights, first, problem or unbound(weights))
    return build_site(chain, weights, first, second, prover, sink_gate(chain, weights))


def build_site(
    chain: Chain,
    weights: Weights,
    first: Product,
    second: Product,
    prover: MaskProver,
    gate: SinkGate | None = None,
) -> AttentionSite:
    """The site of a chain between two bound products, whose output a gate of sinks may follow."""
    if gate is not None:
        weights = dataclasses.replace(weights, output=gate.output)
    given_sinks = chain.sinks if gate is None else gate.sinks
    product, output = chain.product, weights.output
    query, key, value = bound_operands(chain, weights, first, second, prover)
    folded = len(shape_of(chain.softmax)) == 3
    scores = read_scores(chain, prover)
    own = frozenset() if gate is None else gate.nodes
    own |= {step for step in weights.steps if op_name(step) == "type_as"}
    sinks = None if given_sinks is None or folded else sink_logits(given_sinks, output, prover)
    reason = (
        shape_reason(query, key, value)
        or scores.problem
        or ("sinks are not one number per head" if given_sinks and sinks is None else "")
        or other_readers(chain, own)
        or written_late((query, key, value), product, output, prover)
        or gradient_reason(output)
    )
    proof, bias = MaskProof(None, "not read: the site stays dense"), scores.bias
    steps: Sequence[tuple[fx.Node, fx.Node]] = ()
    line = None
    if not reason:
        proof, bias, steps = prove_masks(chain, scores, query, key, prover)
        if proof.meaning is None and bias is None:
            proof, line = prove_by_distance(chain, scores, query, key, prover, proof)
    return make_site(
        output,
        query=query,
        key=key,
        value=value,
        scale=scores.scale,
        softcap=scores.softcap,
        sinks=sinks,
        mask=proof.meaning,
        unproven=proof.reason,
        mask_tensor=None
        if reason or line
        else added_mask(steps, query, key, chain.softmax, prover),
        key_bias=None if bias is None else first_row(bias.node, chain.softmax),
        bias_factor=1.0 if bias is None else bias.factor,
        ahead=None if bias is None else bias.ahead,
        distance_bias=line,
        output_transposed=second.output_transposed,
        output_folded=len(shape_of(output)) == 3,
        dtype=example(product).dtype,
        dense_reason=reason,
    )


def prove_masks(
    chain: Chain, scores: Scores, query: fx.Node, key: fx.Node, prover: MaskProver
) -> tuple[MaskProof, KeyBias | None, Sequence[tuple[fx.Node, fx.Node]]]:
    """What the masks of a chain mean, the bias per key beside them, and the steps of the masks.

    What is added to the scores is a mask where it is proven to be one, and else a bias if it has
    one number per key.
    """
    leading = leading_sizes(chain.softmax)

    def prove(steps: Sequence[tuple[fx.Node, fx.Node]]) -> MaskProof:
        return prover.prove_steps(steps, query, key, chain.softmax, leading, scores.factors)

    bias, steps = scores.bias, scores.masks
    proof = prove(steps)
    ahead = (
        hidden_ahead(proof, steps, REPLACED) if bias is not None and not scores.factors else None
    )
    if proof.meaning is None:
        others, biases = split_bias(steps, prover)
        if biases and scores.softcap > 0:
            return MaskProof(None, CAPPED_BIAS), None, steps
        if len(biases) > 1 or (biases and bias is not None):
            return MaskProof(None, TWO_BIASES), None, steps
        if biases:
            node = added(*biases[0])
            assert node is not None
            bias, proof = KeyBias(node), prove(others)
            place = REPLACED if is_first(biases[0], steps) else REPLACED_FIRST
            ahead = hidden_ahead(proof, others, place)
            steps = others
    if bias is not None and proof.meaning is not None:
        if proof.meaning.mean_of_hidden:
            return MaskProof(None, NO_KEYS), None, steps
        proof = dataclasses.replace(proof, meaning=with_words(proof.meaning))
        bias = dataclasses.replace(bias, ahead=ahead)
    return proof, bias, steps


def prove_by_distance(
    chain: Chain,
    scores: Scores,
    query: fx.Node,
    key: fx.Node,
    prover: MaskProver,
    before: MaskProof,
) -> tuple[MaskProof, fx.Node | None]:
    """What the masks of a chain mean beside a bias by distance, and the line of that.

    before: the proof without one, which stays where there is none.
    """
    if scores.softcap > 0 or len(shape_of(chain.softmax)) != 4:
        return before, None
    found, steps = split_distance(scores.masks, query, key, prover)
    if found is None or scores.factors:
        return before, None
    proof = prover.prove_steps(steps, query, key, chain.softmax, leading_sizes(chain.softmax))
    return with_distance(proof), found.line


def is_first(step: tuple[fx.Node, fx.Node], steps: Sequence[tuple[fx.Node, fx.Node]]) -> bool:
    """Whether a step comes before those that hide keys."""
    return next(op for op, _ in steps if op_name(op) in MASKS) is step[0]


def bound_operands(
    chain: Chain, weights: Weights, first: Product, second: Product, prover: MaskProver
) -> tuple[fx.Node, fx.Node, fx.Node]:
    """Query, key and value of four dimensions: those of the graph, or new nodes."""
    product, output = chain.product, weights.output
    if len(first.left_order) == len(first.right_order) == len(second.right_order) == 4:
        query = original(first.left, product, output, prover, first.left_order)
        return query, *original_pair(
            first.right,
            second.right,
            product,
            output,
            prover,
            first.right_order,
            second.right_order,
        )
    fold = fold_of(chain, weights.operand)
    if fold is not None:
        heads = fold[1]
    else:
        heads = heads_behind(in_order(first.left, first.left_order, product), product, prover)

    def four(node: fx.Node, order: tuple[int, ...], like: int, before: fx.Node) -> fx.Node:
        if len(order) == 4:
            return original(node, before, output, prover, order)
        if like == 4:
            return without_heads(node, order, before)
        return unfolded(in_order(node, order, before), heads, before)

    ranks = len(first.left_order), len(second.left_order)
    return (
        four(first.left, first.left_order, 3, product),
        four(first.right, first.right_order, ranks[0], product),
        four(second.right, second.right_order, ranks[1], output),
    )


def rounding(chain: Chain, weights: Weights) -> str:
    """Why the steps between the products round more than the products do; "" if they do not."""
    steps = [op for op, _ in chain.steps]
    return precision_problem(chain.product, [*steps, chain.softmax, *weights.steps])


def unbound(weights: Weights) -> str:
    """Why the products are none of attention that is served."""
    pair = operands(weights.output)
    if op_name(weights.output) != "einsum" and pair[0] is not weights.operand:
        return FROM_THE_RIGHT
    return NO_PRODUCTS


def dense_site(chain: Chain, weights: Weights, first: Product | None, reason: str) -> AttentionSite:
    """A site that can only stay as it is; its query is [B, H, Nq, D] where that is known."""
    if first is not None and len(first.left_order) == len(first.right_order) == 4:
        query = in_order(first.left, first.left_order, chain.product)
        key = in_order(first.right, first.right_order, chain.product)
    else:
        query, key = operands(chain.product)
    value = next(node for node in operands(weights.output) if node is not weights.operand)
    return make_site(
        weights.output,
        query=query,
        key=key,
        value=value,
        scale=1.0,
        mask=None,
        unproven=reason,
        dense_reason=reason,
        rows=shape_of(chain.softmax)[-2],
    )


def is_softmax(node: fx.Node) -> bool:
    """Whether a node is a softmax over the last dimension."""
    if node.op not in ("call_function", "call_method") or op_name(node) != "softmax":
        return False
    given = bind(node)
    if not is_tensor(node) or not is_tensor(given.get("input")) or "out" in given:
        return False
    return given.get("dim") in (-1, len(shape_of(node)) - 1)


def sink_logits(sinks: fx.Node, softmax: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The [H] tensor behind sinks of [B, H, Nq, 1]; None if they are something else.

    One number that all heads share is repeated by a new node.
    """
    expr = prover.reader.read(sinks, softmax)
    if not isinstance(expr, AppliedUndef) or expr.args not in ((axis(1),), ()):
        return None
    node = prover.reader.sources[expr.func.__name__]
    heads = shape_of(sinks)[1]
    if len(shape_of(node)) != 1 or prover.writes.ever_written(node):
        return None
    size = shape_of(node)[0]
    if size == 1 and expr.args == ():
        return node if heads == 1 else repeated(node, heads, softmax)
    return node if size == heads and expr.args == (axis(1),) else None


def repeated(node: fx.Node, heads: int, before: fx.Node) -> fx.Node:
    """A new node with a [1] tensor repeated for each head; dead until a rewrite reads it."""
    return new_node(before, torch.ops.aten.repeat.default, node, [heads])


def other_readers(chain: Chain, own: frozenset[fx.Node]) -> str:
    """Why the scores must exist anyway: something else reads them than the chain and what is `own`.

    What takes their shape or their dtype alone, for the chain itself, is gone when that is gone.
    """
    known = chain.path | own
    for node in chain.path - {chain.softmax}:
        for user in node.users:
            if user in known or is_unread(user):
                continue
            if reads_no_values(user, node) and known.issuperset(user.users):
                continue
            if leads_to(user, chain.path):
                return CHANGED_BY_THEMSELVES.format(op_name(user))
            return f"attention scores are also read by {user.name}"
    return ""


def leads_to(node: fx.Node, path: set[fx.Node]) -> bool:
    """Whether what an op makes comes back to the scores, a few ops later."""
    level = {node}
    for _ in range(MAX_STEPS):
        level = {user for item in level for user in item.users}
        if level & path:
            return True
    return False


def reads_no_values(op: fx.Node, given: fx.Node) -> bool:
    """Whether an op takes no more than the shape or the dtype of a tensor."""
    return op_name(op) in SHAPED_AS and place_of(op, given) == "other"


def written_late(
    tensors: tuple[fx.Node, ...], product: fx.Node, output: fx.Node, prover: MaskProver
) -> str:
    """Why query, key or value cannot be read at the output: they change before it."""
    for node in tensors:
        if prover.writes.written_between(made_from(node), product, output):
            return f"{made_from(node).name} is written in place before the output"
    return ""


SPELLING = Spelling("eager", match_eager, frozenset({"softmax"}))
