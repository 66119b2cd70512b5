"""A bias by distance: a number per head and distance between key and query, added to the scores.

It is a *line* [H or 1, L], of which entry `k - i + Nq - 1` is added to the scaled score of the i-th
query and the key at position k: T5's buckets, ALiBi both ways. The line begins with the last
query and the first key; L is at least Nq + Nk - 1, so that every pair has an entry. It is added
before a softcap. Estimators that look at runs of keys read a line of runs.

Letters: B batch, H query heads, h heads asked for, Nq queries, Nk keys, R rows, L distances.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def bias_rows(line: Tensor, rows: Tensor, num_queries: int, first: int, last: int) -> Tensor:
    """What is added to the scores of some query rows with the keys first <= k < last.

    line: [.., L]; rows: int64, of any shape [..]; the result is [*line's leading, *rows', keys].
    """
    starts = (num_queries - 1 - rows + first)[..., None]
    places = starts + torch.arange(last - first, device=line.device)
    return line[..., places]


def bias_of_queries(line: Tensor, start: int, stop: int, num_queries: int) -> Tensor:
    """The line of the queries start <= i < stop alone; a view."""
    return line[:, num_queries - stop : line.shape[1] - start]


def of_heads(line: Tensor | None, heads: Sequence[int]) -> list[Tensor | None]:
    """The line [L] of each of some query heads; None where there is none."""
    if line is None:
        return [None] * len(heads)
    return [line[head if line.shape[0] > 1 else 0] for head in heads]


def run_line(line: Tensor, length: int) -> Tensor:
    """The bias of a run of `length` keys as if it were one, by the distance to its first key.

    line: fp32 [.., L]; the result as well. It is the logarithm of the mean of the exponentials:
    what a run weighs with equal scores. A run that ends beyond the line is taken to go on with its
    last number.
    """
    runs = torch.cat([line, line[..., -1:].expand(*line.shape[:-1], length - 1)], -1)
    left = length
    while left % 2 == 0:  # each sum of two is one of twice as many
        step = length // left
        runs = torch.logaddexp(runs[..., :-step], runs[..., step:])
        left //= 2
    if left > 1:
        places = torch.arange(line.shape[-1], device=line.device)[:, None]
        steps = torch.arange(left, device=line.device) * (length // left)
        runs = runs[..., places + steps].logsumexp(-1)
    return runs[..., : line.shape[-1]] - math.log(length)


def antidiagonal_line(line: Tensor, origin: int, length: int, groups: int) -> Tensor:
    """The mean bias on the antidiagonal of `length` queries and as many keys, by groups.

    line: fp32 [.., L], whose entry `origin` is the distance 0. The result is [.., 2 * groups - 1]:
    entry `groups - 1 + g` is of the key group that comes g groups after the query group.
    """
    steps = torch.arange(length, device=line.device) * 2 - (length - 1)
    return line_of_groups(line, origin, length, groups, steps).mean(-1)


def pair_line(line: Tensor, origin: int, length: int, groups: int) -> Tensor:
    """The bias of a block of `length` queries with as many keys, as if both were one, by blocks.

    The result is as that of `antidiagonal_line`; each entry is the logarithm of the mean of the
    exponentials of all pairs.
    """
    steps = torch.arange(1 - length, length, device=line.device)
    weights = (length - steps.abs()).float().log()
    pairs = line_of_groups(line, origin, length, groups, steps)
    return (pairs + weights).logsumexp(-1) - 2 * math.log(length)


def line_of_groups(line: Tensor, origin: int, length: int, groups: int, steps: Tensor) -> Tensor:
    """Entries of a line at the distances between groups, and some steps beside: [.., G, steps]."""
    apart = torch.arange(1 - groups, groups, device=line.device) * length + origin
    return line[..., (apart[:, None] + steps).clamp(0, line.shape[-1] - 1)]
