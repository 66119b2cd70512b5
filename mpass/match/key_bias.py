"""Biases on the scores that are the same in every row: one number per key, as ALiBi has them.

What is added has one row, [.., 1, Nk], whatever its values are: that is all there is to prove. A
mask of padding that is made of a number such as -10000 may be one.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import sympy
import torch
from torch import fx

from mpass.graph.arguments import argument, subject, tensor_arguments
from mpass.graph.nodes import example, is_tensor, op_name, shape_of
from mpass.graph.site import HiddenAhead, KeptKeys, Length, MaskMeaning
from mpass.graph.sizes import agree
from mpass.lowering.rows_before_keys import ADDED
from mpass.masks.conjuncts import visible
from mpass.masks.expressions import NotUnderstood, axis
from mpass.masks.prover import MaskProof, MaskProver
from mpass.masks.scores import ROUNDS_SCORES_OFF, hidden_numbers
from mpass.match.common import FLOATS, constant_number, new_node

NO_CHANGES = frozenset(
    "to type to_copy type_as float view reshape unsafe_view flatten unflatten contiguous".split()
)
"""Ops that leave scores as they are."""

TWO_BIASES = "two biases are added to the scores: add them to each other first"
CAPPED_BIAS = "a bias, or what is not known to be a mask, is added to scores that have a softcap"
NOT_PER_KEY = (
    "baddbmm adds to the scores what is not known to be the same in each row: add one number "
    "per key"
)


@dataclass(frozen=True)
class KeyBias:
    """A bias per key: its node, the number that it is multiplied by, and what keys ahead get."""

    node: fx.Node
    factor: float = 1.0
    ahead: HiddenAhead | None = None


def is_key_bias(bias: object, scores: Sequence[Length], prover: MaskProver) -> bool:
    """Whether a tensor that is added to scores of a shape [.., Nq, Nk] has one number per key.

    Nothing may write to it, since it is read at the attention's output.
    """
    if not isinstance(bias, fx.Node) or not is_tensor(bias):
        return False
    shape, whole = shape_of(bias), scores
    if example(bias).dtype not in FLOATS or not 1 <= len(shape) <= len(whole):
        return False
    if is_one(whole[-2]) or prover.writes.ever_written(bias):
        return False
    if not (len(shape) == 1 or is_one(shape[-2]) or has_equal_rows(bias, prover)):
        return False
    return is_one(shape[-1]) or agree(shape[-1], whole[-1])


def is_mask(node: fx.Node | None, op: fx.Node, prover: MaskProver) -> bool:
    """Whether what an op adds only hides keys, by numbers so low that no score is left of them."""
    read = None if node is None else prover.reader.read(node, op)
    if read is None or visible(read) is None:
        return False
    return all(hidden <= ROUNDS_SCORES_OFF for hidden in hidden_numbers(read))


def has_equal_rows(bias: fx.Node, prover: MaskProver) -> bool:
    """Whether a tensor [.., Nq, Nk] is read as the same in each row, as one that is expanded is."""
    row = axis(len(shape_of(bias)) - 2)
    try:
        return not prover.reader.read(bias, bias.next).has(row)
    except (NotUnderstood, LookupError, TypeError, ValueError):
        return False


def first_row(bias: fx.Node, before: fx.Node) -> fx.Node:
    """The bias with one row: what was expanded, or a view of it, made by a new node.

    The gradient of a view has the size of the whole, which for expanded rows is that of the scores.
    """
    shape = shape_of(bias)
    if len(shape) == 1 or is_one(shape[-2]):
        return bias
    whole = subject(bias)
    if op_name(bias) == "expand" and isinstance(whole, fx.Node) and is_tensor(whole):
        sizes = shape_of(whole)
        if len(sizes) == len(shape) and is_one(sizes[-2]) and same_sizes_but_rows(sizes, shape):
            return whole
    return new_node(before, torch.ops.aten.slice.Tensor, bias, -2, 0, 1)


def same_sizes_but_rows(sizes: Sequence[Length], shape: Sequence[Length]) -> bool:
    """Whether nothing but rows, or what may have the size 1, was expanded."""
    return all(is_one(one) or agree(one, other) for one, other in zip(sizes, shape, strict=True))


def is_one(size: object) -> bool:
    """Whether a size is 1 whatever the lengths are."""
    return isinstance(size, int) and size == 1


def added(op: fx.Node, carried: fx.Node) -> fx.Node | None:
    """The tensor that an op adds to the scores it carries; None where it does something else."""
    if op_name(op) != "add":
        return None
    others = [node for node in tensor_arguments(op) if node is not carried]
    return others[0] if len(others) == 1 else None


def split_bias(
    steps: Sequence[tuple[fx.Node, fx.Node]], prover: MaskProver
) -> tuple[list[tuple[fx.Node, fx.Node]], list[tuple[fx.Node, fx.Node]]]:
    """Steps that put masks on scores, and those that may add a bias per key.

    What is known to be a mask of padding is no bias: rows that see no key would be others.
    """
    masks: list[tuple[fx.Node, fx.Node]] = []
    biases: list[tuple[fx.Node, fx.Node]] = []
    for op, carried in steps:
        node = added(op, carried)
        own = is_key_bias(node, shape_of(op), prover) and not is_mask(node, op, prover)
        (biases if own else masks).append((op, carried))
    return masks, biases


def bias_of_product(product: fx.Node, prover: MaskProver) -> tuple[KeyBias | None, str]:
    """The bias per key that baddbmm adds; or why its addend keeps a site dense."""
    if op_name(product) != "baddbmm":
        return None, ""
    beta = constant_number(argument(product, "beta", 1))
    bias = argument(product, "input")
    if beta == 0 or prover.reader.read(bias, product) == sympy.Integer(0):
        return None, ""
    if beta is not None and is_key_bias(bias, shape_of(product), prover):
        return KeyBias(bias, beta), ""
    return None, NOT_PER_KEY


def hidden_ahead(
    proof: MaskProof, steps: Sequence[tuple[fx.Node, fx.Node]], replacing: str
) -> HiddenAhead | None:
    """What keys ahead of a query get, where one step hides them by a finite number.

    steps: what is done to scores beside the bias. replacing: what it is that the number takes the
    place of, where it is not added.
    """
    meaning = proof.meaning
    if meaning is None or len(proof.hidden) != 1 or not is_prefix(meaning):
        return None
    if len([op for op, _ in steps if op_name(op) not in NO_CHANGES]) != 1:
        return None
    (number,) = proof.hidden
    if not number.is_finite:
        return None
    return HiddenAhead(float(number), replacing if proof.replaced else ADDED)


def is_prefix(meaning: MaskMeaning) -> bool:
    """Whether a query sees all keys up to its own position."""
    return meaning.causal and not meaning.window and meaning.key_mask is None


def with_choice(meaning: MaskMeaning, kept: KeptKeys | None) -> MaskMeaning:
    """A meaning that tells of the keys that each query keeps as well."""
    if kept is None:
        return meaning
    words = f"each query keeps the {kept.keep} keys with the largest bias that it may see"
    return dataclasses.replace(meaning, proof=(*meaning.proof, words))


def with_words(meaning: MaskMeaning) -> MaskMeaning:
    """A meaning that tells of the bias as well."""
    words = "a bias per key is added to the scores"
    return dataclasses.replace(meaning, proof=(*meaning.proof, words))
