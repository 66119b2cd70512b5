"""Masks that cannot be proven, one per reason, with words of the reason.

A mask is a function of `Inputs`: bool or additive, [N, N], or [N] over the queries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

N = 192
BIG = 2**30 + 1


@dataclass(frozen=True)
class Inputs:
    """What masks are made from: query and key [1, 4, N, 16], and inputs that are not known.

    ids: int64 [N]; short: int16 [N]; floats: [N]; flags: bool [1, N]; mask: bool [N, N]; size:
    int64 of no dimension.
    """

    query: Tensor
    key: Tensor
    ids: Tensor
    short: Tensor
    floats: Tensor
    flags: Tensor
    mask: Tensor
    size: Tensor


def positions(dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.arange(N, dtype=dtype)


def causal() -> Tensor:
    return positions()[:, None] >= positions()


def distance() -> Tensor:
    return positions()[:, None] - positions()


def written_through_a_view(x: Inputs) -> Tensor:
    mask = causal()
    mask[3:].fill_(True)
    return mask


def assigned_by_tensor(x: Inputs) -> Tensor:
    mask = causal()
    mask[x.ids] = True
    return mask


def assigned_with_a_step(x: Inputs) -> Tensor:
    mask = causal()
    mask[::2] = True
    return mask


def input_written_in_place(x: Inputs) -> Tensor:
    mask = causal() & (x.ids != 3)
    x.ids.add_(1)
    return mask


def many_values(x: Inputs) -> Tensor:
    total = positions() * 0
    for i in range(8):
        total = total + torch.where(positions() > i, 2**i, 0)
    return total > 3


def per_head(x: Inputs) -> Tensor:
    heads = torch.arange(4)[:, None, None]
    return causal() & (positions() >= heads * x.ids)


def reshaped(x: Inputs) -> Tensor:
    queries, keys = x.query.shape[2], x.key.shape[2]
    rows = torch.arange(queries)[:, None] >= torch.arange(keys)
    return rows.view(keys, queries).T


def before_the_first_key(x: Inputs) -> Tensor:
    """The first queries of this call stand before the first key."""
    queries, keys = x.query.shape[2], x.key.shape[2]
    return torch.arange(queries)[:, None] + (keys - queries - 100) >= torch.arange(keys)


def half_window(x: Inputs) -> Tensor:
    queries, keys = x.query.shape[2], x.key.shape[2]
    away = torch.arange(queries)[:, None] - torch.arange(keys)
    return (away >= 0) & (away < queries // 2)


def unknown_sign(x: Inputs) -> Tensor:
    queries, keys = x.query.shape[2], x.key.shape[2]
    mask = torch.arange(queries)[:, None] >= torch.arange(keys)
    return mask.T[keys - 100]


def assigned_up_to_unknown_sign(x: Inputs) -> Tensor:
    queries, keys = x.query.shape[2], x.key.shape[2]
    mask = torch.arange(queries)[:, None] >= torch.arange(keys)
    mask[:, : keys - 100] = True
    return mask


Maker = Callable[[Inputs], Tensor]


def reshaped_in_place(x: Inputs) -> Tensor:
    mask = causal()
    mask.unsqueeze_(0)
    return mask & causal()


def made_of_many_parts(x: Inputs) -> Tensor:
    mask = causal()
    for i in range(2, 60):
        mask = mask ^ (positions() % i == 1)
    return mask


def written_row_by_row(x: Inputs) -> Tensor:
    mask = torch.zeros(N, N, dtype=torch.bool)
    for i in range(402):
        mask[i % N, : i % N + 1] = True
    return mask


def of_too_many_dimensions(x: Inputs) -> Tensor:
    mask = causal()
    mask[3] = torch.ones(1, N, dtype=torch.bool)
    return mask


def kept_to_out(x: Inputs) -> Tensor:
    return torch.ge(positions()[:, None], positions(), out=torch.empty(N, N, dtype=torch.bool))


MASKS: dict[str, tuple[Maker, str]] = {
    "unknown argument": (
        lambda x: torch.ones(N, dtype=torch.uint8).view(dtype=torch.int8) > positions(),
        "reinterpreting bits",
    ),
    "old form of add": (
        lambda x: torch.add(positions()[:, None], 2, positions()) > 3,
        "argument 3 is not understood",
    ),
    "reshaped in place": (reshaped_in_place, "is reshaped in place"),
    "many parts": (made_of_many_parts, "made of too many parts"),
    "row by row": (written_row_by_row, "this mask takes more than"),
    "more dimensions": (of_too_many_dimensions, "a value of more dimensions"),
    "out": (kept_to_out, "written to out="),
    "nothing seen": (lambda x: causal() & (positions() < 0), "the mask hides every key"),
    "unknown op": (lambda x: distance().sin() > 0, "sin: this op is not understood"),
    "view": (written_through_a_view, "is written through another view"),
    "input": (lambda x: x.mask, "is an input whose values are unknown when compiling"),
    "fractions": (lambda x: torch.arange(0, N / 2, 0.5) > 3, "arange of fractions"),
    "constants": (
        lambda x: torch.tensor([1.0, 2.0, 3.0])[positions() % 3] > 2,
        "a tensor of several constants",
    ),
    "inexact": (lambda x: torch.where(causal(), 0.1, -torch.inf), "does not hold 0.1"),
    "bf16": (lambda x: positions(torch.bfloat16) > 3, "dtype that does not hold every position"),
    "half": (
        lambda x: positions().to(torch.bfloat16)[:, None] >= positions(),
        "torch.bfloat16 does not hold every value of",
    ),
    "truncated": (lambda x: x.floats.to(torch.int64) > 3, "fractions cut off by torch.int64"),
    "bits": (lambda x: (x.ids & 3) > 1, "bitwise op on integers"),
    "not bits": (lambda x: ~x.ids < 0, "bitwise not on integers"),
    "nan": (lambda x: torch.where(causal(), 0.0, torch.nan), "where: nan"),
    "infinity less infinity": (
        lambda x: torch.full((N,), torch.inf) - torch.full((N,), torch.inf),
        "sub: nan",
    ),
    "complex": (lambda x: torch.full((N,), 1j) == 1, "constant 1j"),
    "narrow": (lambda x: x.short + 1 > 3, "arithmetic on positions in torch.int16"),
    "bias": (lambda x: x.floats + distance(), "what may be fractions, as biases are"),
    "of both": (
        lambda x: (x.ids[:, None] + x.ids) * -0.1,
        "what is added is not known to be a mask: mul",
    ),
    "wrap": (lambda x: distance().int() + BIG > BIG, "torch.int32 might wrap or round"),
    "rounding": (
        lambda x: torch.div(distance(), 4, rounding_mode="trunc") > 0,
        "division with rounding_mode='trunc'",
    ),
    "division": (lambda x: distance() / 4 > 0, "true division"),
    "floor division": (
        lambda x: distance() // (x.ids + 1) > 0,
        "floor division by what is not a positive integer",
    ),
    "remainder": (
        lambda x: distance() % (x.ids + 1) > 0,
        "remainder by what is not a positive integer",
    ),
    "cumulative sum": (lambda x: x.ids.cumsum(-1) > 3, "cumulative sum of what changes"),
    "largest of all": (lambda x: positions() < x.ids.max(), "the extremum of a tensor"),
    "differences": (lambda x: x.ids.diff(n=2, append=x.ids[:2]) > 3, "higher differences"),
    "difference of flags": (
        lambda x: x.flags[0].diff(prepend=x.flags[0, :1]),
        "difference of what may have one element",
    ),
    "prepended": (
        lambda x: x.ids[2:].diff(prepend=x.ids[:3])[:, None] > positions(),
        "several values prepended",
    ),
    "index": (lambda x: causal()[x.ids], "indexing by values that might be negative"),
    "listed": (lambda x: causal()[[*range(N)]], "indexing by a list"),
    "gather": (
        lambda x: x.flags[0].gather(0, x.ids),
        "gathering by values that might be negative",
    ),
    "select": (
        lambda x: causal().index_select(0, x.ids),
        "selecting by values that might be negative",
    ),
    "assigned by tensor": (assigned_by_tensor, "assignment by tensor, mask or new dimension"),
    "assigned with a step": (assigned_with_a_step, "assignment with a step"),
    "vector transposed": (lambda x: x.ids.t() > 3, "t of 1 dimensions"),
    "bits of floats": (lambda x: x.floats.view(torch.int32) > 3, "reinterpreting bits"),
    "flattening": (lambda x: x.flags[0].repeat_interleave(1), "repeat_interleave by a tensor"),
    "reflected": (
        lambda x: F.pad(x.floats[None, 1:], (1, 0), mode="reflect")[0] > 0,
        "padding with mode 'reflect'",
    ),
    "many values": (many_values, "a choice between too many values"),
    "infinity": (lambda x: x.floats < torch.inf, "comparison with infinity"),
    "every key hidden": (lambda x: causal() & (positions() < 0), "the mask hides every key"),
    "written in place": (input_written_in_place, "is written in place"),
    "after the position": (
        lambda x: positions() <= positions()[:, None] - 3,
        "queries do not see their own position: k <= q - 3",
    ),
    "two positions": (
        lambda x: positions() <= positions()[:, None] + 2 * x.size,
        "the first query's position is known at run time only",
    ),
    "position": (
        lambda x: positions() <= positions()[:, None] + x.size,
        "the position of the first query is a tensor",
    ),
    "lopsided window": (
        lambda x: (distance() < 90) & (distance() > -40),
        "window of 89 keys back and 39 ahead",
    ),
    "window with a gap": (
        lambda x: (distance() >= 9) & (distance() < 90) | (distance() < 0) & (distance() > -90),
        "is neither causal, window nor padding",
    ),
    "window alone": (lambda x: distance() < 90, "sliding window without causality"),
    "empty window": (
        lambda x: (distance() >= -5) & (distance() < -6),
        "hides every key",
    ),
    "per head": (per_head, "mask may differ per head"),
    "chunks": (
        lambda x: causal() & (positions()[:, None] // 64 == positions() // 64),
        "chunked attention in chunks of 64 positions",
    ),
    "odd": (
        lambda x: causal() & ((positions()[:, None] + positions()) % 2 == 0),
        "is neither causal, window nor padding",
    ),
    "from data": (lambda x: x.floats[:, None] > x.floats, "mask is not proven"),
}

DYNAMIC_MASKS: dict[str, tuple[Maker, str]] = {
    "reshaped": (reshaped, "reshape of unknown sizes"),
    "lengths": (before_the_first_key, "might be negative"),
    "half window": (half_window, "is not a constant"),
    "unknown sign": (unknown_sign, "of unknown sign"),
    "slice of unknown sign": (assigned_up_to_unknown_sign, "slice up to or from"),
}
"""Masks of inputs whose lengths are not known when compiling."""
