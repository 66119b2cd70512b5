"""A bias per key inside of the mask that SDPA is given: ALiBi with a causal mask, as Falcon has it.

The mask is walked backwards through what hides keys (masked_fill, where, adding a mask) to a tensor
with one number per key. What the steps after that do to it is proven as if it were the scores. One
of the steps may hide all but the best keys of each query, as Doge does: see top_keys.py.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from mpass.graph.arguments import bind, tensor_arguments
from mpass.graph.nodes import example, op_name, shape_of
from mpass.graph.site import HiddenAhead, KeptKeys, MaskMeaning
from mpass.lowering.rows_before_keys import NOT_BIASED
from mpass.masks.conjuncts import visible
from mpass.masks.prover import MaskProver
from mpass.match.eager_scores import CASTS
from mpass.match.key_bias import hidden_ahead, is_key_bias
from mpass.match.repeat_kv import original
from mpass.match.top_keys import kept_keys

MAX_STEPS = 8


@dataclass(frozen=True)
class MaskedBias:
    """A bias per key, what the mask around it means, which of the keys are kept, and what others
    ahead of a query get."""

    node: fx.Node
    meaning: MaskMeaning
    best: KeptKeys | None = None
    ahead: HiddenAhead | None = None


def bias_behind(
    mask: fx.Node | None, query: fx.Node, key: fx.Node, at: fx.Node, prover: MaskProver
) -> MaskedBias | None:
    """A bias per key, and what the mask around it means, as the attention `at` reads them.

    mask: added to the scores of query [B, H, Nq, D] and key [B, Hk, Nk, D]. It may be repeated for
    the query heads of a kv head. None where there is no bias per key, or the rest is no mask that
    is proven, or rows that see no key would be others.
    """
    if mask is None or prover.writes.ever_written(mask):
        return None
    scores = (*shape_of(query)[:3], shape_of(key)[2])
    if is_key_bias(mask, scores, prover):
        seen = MaskMeaning(causal=False, proof=("no mask: every key is seen",))
        return MaskedBias(mask, seen)
    node = original(mask, at, at, prover) if len(shape_of(mask)) == 4 else mask
    steps: list[tuple[fx.Node, fx.Node]] = []
    best: KeptKeys | None = None
    for _ in range(MAX_STEPS):
        carried = biased_argument(node, prover)
        found = None if carried is None else kept_keys(node, carried, prover)
        if found is None and is_key_bias(node, scores, prover):
            return proven_bias(node, steps[::-1], best, query, key, at, prover)
        if carried is None or prover.writes.ever_written(node):
            return None
        if found is None:
            steps.append((node, carried))
        elif best is not None or any(op_name(op) not in CASTS for op, _ in steps):
            return None  # a mask after the choice: then rows may see no key at all
        best = found or best
        node = carried
    return None


def proven_bias(
    bias: fx.Node,
    steps: list[tuple[fx.Node, fx.Node]],
    best: KeptKeys | None,
    query: fx.Node,
    key: fx.Node,
    at: fx.Node,
    prover: MaskProver,
) -> MaskedBias | None:
    """What the steps after a bias mean, and the best keys that are kept of what they let be seen.

    The keys that are best in each prefix say it all where a query sees a prefix, and padding.
    """
    proof = prover.prove_steps(steps, query, key, at)
    meaning = proof.meaning
    if meaning is None or meaning.mean_of_hidden:
        return None
    prefix = meaning.causal and not meaning.window and meaning.valid_keys is None
    if best is not None and not (prefix and len(shape_of(bias)) == 4):
        return None
    return MaskedBias(bias, meaning, best, hidden_ahead(proof, steps, NOT_BIASED))


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
