"""Tokens in the order of what they look for, so that a block holds tokens that are alike.

Attention that sees both ways gives the same numbers in any order of its keys, and of its queries.
Where they lie in a picture is one order (mpass.lowering.tiles); here keys stand beside keys that
all queries score alike, and queries beside queries that score all keys alike, per head: then the
mean of a run of keys says nearly all of each of them, and one choice of blocks serves 64 queries.
SVG2 (arXiv 2505.18875) sorts tokens of a video by k-means for the same reason; blocks of 64 need
groups of one size, which a tree of halves gives (a k-d tree, Bentley, 1975): at each level a piece
is cut where half of its tokens are less along the direction in which they differ most.

Two keys differ by how much queries tell them apart: their difference is measured in the basis
L of the queries' second moments (E[q q^T] = L L^T), and queries likewise in that of the keys. Of
that space the 16 directions of largest variance are looked at.

Letters: B batch, H query heads, Hk kv heads, N tokens, D head_dim, F directions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mpass.lowering.define import define_op, fake_of
from mpass.lowering.index import BLOCK

DIRECTIONS = 16
"""In so many directions tokens may differ."""

ROUNDS = 6
"""Of the iteration that finds the directions."""

SAMPLED = 4
"""One of so many tokens says where they differ most, and what others tell apart."""

LEAF = 16
"""So few tokens stay together: the run of a mean."""


def tree_order(points: Tensor, leaf: int = LEAF) -> Tensor:
    """The tokens of each row of [G, N, F] in the order of a tree of halves: int64 [G, N].

    Pieces are cut at multiples of 64 tokens, as long as they are larger, so that a piece of 64 is a
    block of an index; then at multiples of `leaf`.
    """
    groups, count, directions = points.shape
    rows, numbers = points.flatten(0, 1), points.flatten()
    device = points.device
    base = torch.arange(groups, device=device)[:, None, None] * count
    order = torch.arange(count, device=device).expand(groups, count)
    pieces = [(0, count)]
    while True:
        cuts = [cut_of(start, stop, leaf) for start, stop in pieces]
        if not any(cuts):
            return order
        starts = torch.tensor([start for start, _ in pieces], device=device)[:, None]
        lengths = torch.tensor([stop - start for start, stop in pieces], device=device)[:, None]
        steps = torch.arange(max(stop - start for start, stop in pieces), device=device)
        real = steps < lengths
        tokens = base + order[:, (starts + steps).clamp(max=count - 1)]
        some = tokens[:, :, ::SAMPLED]
        weight = real[:, ::SAMPLED, None].to(points.dtype)
        held = rows.index_select(0, some.flatten()).view(*some.shape, directions) * weight
        number = weight.sum(1)
        spread = held.square().sum(2) / number - (held.sum(2) / number).square()
        widest = spread.argmax(-1)[..., None]
        along = numbers.take(tokens * directions + widest).masked_fill(~real, torch.inf)
        order = (tokens.gather(2, along.argsort(-1)) - base)[:, real]
        pieces = [
            part
            for (start, stop), cut in zip(pieces, cuts, strict=True)
            for part in ([(start, cut), (cut, stop)] if cut else [(start, stop)])
        ]


def cut_of(start: int, stop: int, leaf: int) -> int:
    """Where a piece is cut in two; 0 for nowhere."""
    length = stop - start
    if length <= leaf:
        return 0
    unit = BLOCK if length > BLOCK else leaf
    return start + max(1, math.ceil(length / unit) // 2) * unit


def moments(tokens: Tensor) -> Tensor:
    """The second moments of some of the tokens [.., N, D]: [.., D, D]."""
    some = tokens[..., ::SAMPLED, :]
    return some.mT @ some / some.shape[-2]


def factor(matrix: Tensor) -> Tensor:
    """L of a matrix L L^T, which a small part of its trace keeps away from singular ones."""
    size = matrix.shape[-1]
    trace = matrix.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    eye = torch.eye(size, dtype=matrix.dtype, device=matrix.device)
    lower, _ = torch.linalg.cholesky_ex(matrix + (1e-4 * trace + 1e-20) * eye)
    return lower


def main_directions(matrix: Tensor, count: int) -> Tensor:
    """The first eigenvectors of matrices [.., D, D], nearly: [.., D, count].

    By orthogonal iteration from a fixed start; nothing makes the host wait for a GPU.
    """
    size = matrix.shape[-1]
    steps = torch.arange(size, dtype=matrix.dtype, device=matrix.device)
    found = torch.cos(steps[:, None] * (steps[:count] + 0.5) * (math.pi / size))
    found = found.expand(*matrix.shape[:-2], size, count)
    for _ in range(ROUNDS):
        grown = matrix @ found
        grown = grown / grown.norm(dim=-2, keepdim=True).clamp(min=1e-20)
        lower = factor(grown.mT @ grown)
        found = torch.linalg.solve_triangular(lower, grown.mT, upper=False).mT
    return found


def points_of(tokens: Tensor, others: Tensor) -> Tensor:
    """Where tokens [.., N, D] stand as others, of the second moments [.., D, D], see them.

    [.., N, F], F = DIRECTIONS or D if that is less. A number that all tokens have says nothing.
    """
    centred = tokens - tokens.mean(-2, keepdim=True)
    lower = factor(others)
    seen = lower.mT @ moments(centred) @ lower
    basis = lower @ main_directions(seen, min(DIRECTIONS, tokens.shape[-1]))
    return (centred @ basis).nan_to_num(0.0)


@define_op("similar_order", "(Tensor query, Tensor key) -> (Tensor, Tensor, Tensor)", chooses=True)
def similar_order(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Orders in which queries and keys that are alike stand together, per head.

    query [B, H, Nq, D], key [B, Hk, Nk, D] -> int64 [B * H * Nq] and [B * Hk * Nk]: which of these
    rows stands at each place; and [B * H * Nq]: the place of each row of the query.
    """
    kv_heads = key.shape[1]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    grouped = query.to(wide).unflatten(1, (kv_heads, -1))
    held = key.to(wide) - key.to(wide).mean(2, keepdim=True)
    keys = rows_of(tree_order(points_of(held, moments(grouped).mean(2)).flatten(0, 1)))
    asked = moments(held)[:, :, None].expand(-1, -1, grouped.shape[2], -1, -1)
    queries = rows_of(tree_order(points_of(grouped, asked).flatten(0, 2)))
    places = torch.arange(len(queries), device=query.device)
    return queries, keys, torch.empty_like(queries).scatter_(0, queries, places)


def rows_of(order: Tensor) -> Tensor:
    """The tokens [G, N] of G heads as numbers of rows of all of them: [G * N]."""
    groups, count = order.shape
    return (order + torch.arange(groups, device=order.device)[:, None] * count).flatten()


@fake_of("similar_order")
def _(query: Tensor, key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    sizes = (math.prod(tensor.shape[:3]) for tensor in (query, key, query))
    own, others, back = (query.new_empty(size, dtype=torch.int64) for size in sizes)
    return own, others, back
