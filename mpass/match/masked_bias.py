"""A bias per key inside of the mask that SDPA is given: ALiBi with a causal mask, as Falcon has it.

The mask is walked backwards through what hides keys (masked_fill, where, adding a mask) to a tensor
with one number per key. What the steps after that do to it is proven as if it were the scores.
"""

from __future__ import annotations

from torch import fx

from mpass.graph.arguments import bind, tensor_arguments
from mpass.graph.nodes import example, op_name, shape_of
from mpass.graph.site import MaskMeaning
from mpass.masks.conjuncts import visible
from mpass.masks.prover import MaskProver
from mpass.match.eager_scores import CASTS
from mpass.match.key_bias import is_key_bias
from mpass.match.repeat_kv import original

MAX_STEPS = 8


def bias_behind(
    mask: fx.Node | None, query: fx.Node, key: fx.Node, at: fx.Node, prover: MaskProver
) -> tuple[fx.Node, MaskMeaning] | None:
    """A bias per key, and what the mask around it means, as the attention `at` reads them.

    mask: added to the scores of query [B, H, Nq, D] and key [B, Hk, Nk, D]. It may be repeated for
    the query heads of a kv head. None where there is no bias per key, or the rest is no mask that
    is proven, or rows that see no key would be others.
    """
    if mask is None or prover.writes.ever_written(mask):
        return None
    scores = (*shape_of(query)[:3], shape_of(key)[2])
    if is_key_bias(mask, scores, prover):
        return mask, MaskMeaning(causal=False, proof=("no mask: every key is seen",))
    node = original(mask, at, at, prover) if len(shape_of(mask)) == 4 else mask
    steps: list[tuple[fx.Node, fx.Node]] = []
    for _ in range(MAX_STEPS):
        if is_key_bias(node, scores, prover):
            proof = prover.prove_steps(steps[::-1], query, key, at)
            meaning = proof.meaning
            return None if meaning is None or meaning.mean_of_hidden else (node, meaning)
        carried = biased_argument(node, prover)
        if carried is None or prover.writes.ever_written(node):
            return None
        steps.append((node, carried))
        node = carried
    return None


def biased_argument(op: fx.Node, prover: MaskProver) -> fx.Node | None:
    """The argument through which a bias reaches a mask, in the mask's own dtype."""
    name = op_name(op)
    if op.op not in ("call_function", "call_method"):
        return None
    if name in CASTS | {"masked_fill", "where"}:
        carried = bind(op).get("input")
    elif name == "add":
        unread = [
            arg for arg in tensor_arguments(op) if visible(prover.reader.read(arg, op)) is None
        ]
        carried = unread[0] if len(unread) == 1 else None
    else:
        return None
    same = isinstance(carried, fx.Node) and example(carried).dtype == example(op).dtype
    return carried if same else None
