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


@dataclass(frozen=True)
class Product:
    """A product of two 4-D tensors.

    left_order, right_order: which of their dimensions are batch, head, position and channel.
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
    if op_name(node) != "matmul" or any(len(shape_of(tensor)) != 4 for tensor in pair):
        return None
    return Product(pair[0], pair[1], right_order=TRANSPOSED)


def bind_value(node: fx.Node, weights: fx.Node) -> Product | None:
    """Weights and value of a product that makes [B, H, Nq, Dv] (or [B, Nq, H, Dv])."""
    if op_name(node) == "einsum":
        product = bind_value_einsum(node, weights)
    else:
        pair = operands(node)
        four = op_name(node) == "matmul" and all(len(shape_of(tensor)) == 4 for tensor in pair)
        product = Product(pair[0], pair[1]) if four else None
    return product if product is not None and product.left is weights else None


def parse_einsum(node: fx.Node) -> tuple[list[str], list[fx.Node], str] | None:
    """Letters of two 4-D operands, the operands, letters of the result."""
    equation, _ = einsum_arguments(node)
    tensors = operands(node)
    if not isinstance(equation, str) or len(tensors) != 2:
        return None
    inputs, _, result = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if len(letters) != 2 or not all(is_four(part) for part in (*letters, result)):
        return None
    return letters, tensors, result


def is_four(letters: str) -> bool:
    """Whether an operand of einsum has four different dimensions."""
    return len(letters) == 4 and len(set(letters)) == 4 and letters.isalpha()


def bind_scores_einsum(node: fx.Node) -> Product | None:
    """`bhqd,bhkd->bhqk` and its kin: the result's letters are batch, head, query, key."""
    parsed = parse_einsum(node)
    if parsed is None:
        return None
    letters, tensors, result = parsed
    batch, head, query, key = list(result)
    left = 0 if query in letters[0] else 1
    mine, other = letters[left], letters[1 - left]
    channel = (set(mine) & set(other)) - {batch, head}
    if len(channel) != 1 or set(mine) != {batch, head, query, *channel}:
        return None
    if set(other) != {batch, head, key, *channel}:
        return None
    inner = channel.pop()
    return Product(
        tensors[left],
        tensors[1 - left],
        order(mine, (batch, head, query, inner)),
        order(other, (batch, head, key, inner)),
    )


def bind_value_einsum(node: fx.Node, weights: fx.Node) -> Product | None:
    """`bhqk,bhkd->bhqd` (or `bqhd`) and its kin."""
    parsed = parse_einsum(node)
    if parsed is None or weights not in parsed[1]:
        return None
    letters, tensors, result = parsed
    left = tensors.index(weights)
    batch, head, query, key = list(letters[left])
    other = letters[1 - left]
    channel = set(other) - {batch, head, key}
    if len(channel) != 1 or set(other) != {batch, head, key, *channel}:
        return None
    inner = channel.pop()
    if result not in (batch + head + query + inner, batch + query + head + inner):
        return None
    return Product(
        weights,
        tensors[1 - left],
        right_order=order(other, (batch, head, key, inner)),
        output_transposed=result[1] == query,
    )


def order(letters: str, wanted: tuple[str, ...]) -> tuple[int, ...]:
    """Where the wanted letters stand."""
    return tuple(letters.index(letter) for letter in wanted)
