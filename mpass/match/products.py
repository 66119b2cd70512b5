"""The two products of attention, by matmul, bmm, baddbmm or einsum, bound to their operands."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from mpass.graph.arguments import bind
from mpass.graph.nodes import is_tensor, op_name, shape_of

OPERANDS = {
    "matmul": ("input", "other"),
    "bmm": ("input", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "einsum": (),
}
"""The products, and the arguments that they multiply (einsum's have no names)."""
IDENTITY = (0, 1, 2, 3)
TRANSPOSED = (0, 1, 3, 2)
FOLDED = (0, 1, 2)
FOLDED_TRANSPOSED = (0, 2, 1)


@dataclass(frozen=True)
class Product:
    """A product of two 4-D tensors, or of two 3-D tensors whose first dimension is batch and head.

    left_order, right_order: which of their dimensions are batch, head, position and channel; of 3-D
    tensors batch (and head), position and channel. A 3-D tensor beside one of 4-D has no heads.
    output_transposed: the result is [B, N, H, D] instead of [B, H, N, D].
    """

    left: fx.Node
    right: fx.Node
    left_order: tuple[int, ...] = IDENTITY
    right_order: tuple[int, ...] = IDENTITY
    output_transposed: bool = False


def is_product(node: fx.Node) -> bool:
    """Whether a node multiplies two tensors of at least three dimensions."""
    if node.op not in ("call_function", "call_method") or op_name(node) not in OPERANDS:
        return False
    tensors = operands(node)
    if len(tensors) < 2 or "out" in node.kwargs:
        return False
    return all(len(shape_of(tensor)) >= 3 for tensor in tensors)


def operands(product: fx.Node) -> list[fx.Node]:
    """The tensors that a product multiplies (baddbmm's addend is none of them)."""
    if op_name(product) == "einsum":
        tensors = einsum_arguments(product)[1]
    else:
        given = bind(product)
        tensors = [given.get(name) for name in OPERANDS.get(op_name(product), ())]
    return [node for node in tensors if isinstance(node, fx.Node) and is_tensor(node)]


def einsum_arguments(product: fx.Node) -> tuple[object, Sequence[Any]]:
    """The equation and the operands, given one by one or as a list."""
    if not product.args or product.kwargs.keys() - {"path"}:
        return None, ()
    equation, *rest = product.args
    if len(rest) == 1 and isinstance(rest[0], (list, tuple)):
        return equation, rest[0]
    return equation, rest


def bind_scores(node: fx.Node) -> Product | None:
    """Query and key of a product that makes scores [B, H, Nq, Nk]; None for other products."""
    if op_name(node) == "einsum":
        return bind_scores_einsum(node)
    pair = operands(node)
    if ranks(pair) == [3, 3]:
        return Product(pair[0], pair[1], left_order=FOLDED, right_order=FOLDED_TRANSPOSED)
    if op_name(node) != "matmul" or ranks(pair) != [4, 4]:
        return None
    return Product(pair[0], pair[1], right_order=TRANSPOSED)


def bind_value(node: fx.Node, weights: fx.Node) -> Product | None:
    """Weights and value of a product that makes [B, H, Nq, Dv] (or [B, Nq, H, Dv])."""
    if op_name(node) == "einsum":
        product = bind_value_einsum(node, weights)
    else:
        pair = operands(node)
        product = None
        if ranks(pair) == [3, 3] and op_name(node) != "baddbmm":
            product = Product(pair[0], pair[1], left_order=FOLDED, right_order=FOLDED)
        elif op_name(node) == "matmul" and ranks(pair) == [4, 4]:
            product = Product(pair[0], pair[1])
    return product if product is not None and product.left is weights else None


def ranks(tensors: list[fx.Node]) -> list[int]:
    """Numbers of dimensions."""
    return [len(shape_of(tensor)) for tensor in tensors]


def parse_einsum(node: fx.Node) -> tuple[list[str], list[fx.Node], str] | None:
    """Letters of two operands, the operands, letters of the result; all of them 3-D or 4-D."""
    equation, _ = einsum_arguments(node)
    tensors = operands(node)
    if not isinstance(equation, str) or len(tensors) != 2:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) != 2 or not all(map(is_distinct, (*letters, result))):
        return None
    return letters, tensors, result


def is_distinct(letters: str) -> bool:
    """Whether an operand of einsum has three or four different dimensions."""
    return len(letters) in (3, 4) and len(set(letters)) == len(letters) and letters.isalpha()


def bind_scores_einsum(node: fx.Node) -> Product | None:
    """`bhqd,bhkd->bhqk`, `bhqd,bkd->bhqk`, `bqd,bkd->bqk` and their kin.

    The result's letters are batch, head, query, key, or a batch of heads, query, key.
    """
    parsed = parse_einsum(node)
    if parsed is None:
        return None
    letters, tensors, result = parsed
    *leading, query, key = list(result)
    left = 0 if query in letters[0] else 1
    mine, other = letters[left], letters[1 - left]
    channel = (set(mine) & set(other)) - set(leading)
    if len(channel) != 1 or set(mine) != {*leading, query, *channel}:
        return None
    shared = leading if len(other) == len(mine) else leading[:1]
    if set(other) != {*shared, key, *channel}:
        return None
    inner = channel.pop()
    return Product(
        tensors[left],
        tensors[1 - left],
        order(mine, (*leading, query, inner)),
        order(other, (*shared, key, inner)),
    )


def bind_value_einsum(node: fx.Node, weights: fx.Node) -> Product | None:
    """`bhqk,bhkd->bhqd` (or `bqhd`), `bhqk,bkd->bhqd`, `bqk,bkd->bqd` and their kin."""
    parsed = parse_einsum(node)
    if parsed is None or weights not in parsed[1]:
        return None
    letters, tensors, result = parsed
    left = tensors.index(weights)
    *leading, query, key = list(letters[left])
    other = letters[1 - left]
    shared = leading if len(other) == len(letters[left]) else leading[:1]
    channel = set(other) - {*leading, query, key}
    if len(channel) != 1 or set(other) != {*shared, key, *channel}:
        return None
    inner = channel.pop()
    transposed = "".join((leading[0], query, *leading[1:], inner))
    if result not in ("".join((*leading, query, inner)), transposed):
        return None
    return Product(
        weights,
        tensors[1 - left],
        left_order=tuple(range(len(leading) + 2)),
        right_order=order(other, (*shared, key, inner)),
        output_transposed=len(leading) == 2 and result == transposed,
    )


def order(letters: str, wanted: tuple[str, ...]) -> tuple[int, ...]:
    """Where the wanted letters stand."""
    return tuple(letters.index(letter) for letter in wanted)
