"""Masks that are trained: each query keeps the keys of its prefix with the largest numbers.

Dynamic mask attention (arXiv 2508.02124, as transformers' Doge computes it) adds a number per key
to the scores and lets each query see the `keep` visible keys whose numbers are largest. The numbers
do not depend on the query, so that a key once dropped never returns: what every query sees is said
by one position per key, its *expiry*, and key j is seen from position j to its expiry.

Where the last number that is kept equals the first that is dropped, which of them is kept is
torch.topk's own affair: such rows are *tied*, and torch.topk is asked, row by row.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim; U units
that choose keys together: B times Hk, or B times H where each query head has numbers of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.lowering.reference.attention import empty_lse, empty_output, repeat_kv

NEVER = 2**31 - 1
"""The expiry of a key that is never dropped."""

STEP = 64
"""Keys taken at a time in the search for expiries."""

CELLS = 2**20
"""Cells of scores that tied rows take at a time."""


@dataclass(frozen=True, slots=True, eq=False)
class DynamicMask:
    """Which keys a query sees: causal, not hidden by key_mask, and among the best of these.

    bias: float [B or 1, H or Hk or 1, 1, Nk], added to the scaled scores; the best are its largest.
    keep: how many of them. hidden: the number that the program puts in the place of hidden ones.
    early: whether the best are those of all keys, whatever a query may see of them.
    query_offset: keys before the first query. key_mask: bool [B, Nk] or None.
    """

    bias: Tensor
    keep: int
    hidden: float
    early: bool = False
    query_offset: int = 0
    key_mask: Tensor | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Units:
    """A call in the form that is computed: U units with G query heads each.

    query: [U, G, Nq, D]; key: [U, Nk, D]; value: [U, Nk, Dv]; numbers: [U, Nk] in the bias's dtype;
    real: bool [U, Nk]; all but numbers and real in fp32, of fp64 inputs in fp64.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    numbers: Tensor
    real: Tensor


def units(query: Tensor, key: Tensor, value: Tensor, mask: DynamicMask) -> Units:
    """The units of a call; query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv]."""
    batch, heads, num_queries, dim = query.shape
    num_keys = key.shape[2]
    wide = torch.float64 if query.dtype == torch.float64 else torch.float32
    own = heads if mask.bias.shape[1] == heads else key.shape[1]
    if own != key.shape[1]:
        key, value = repeat_kv(key, own), repeat_kv(value, own)
    real = mask.key_mask
    if real is None:
        real = torch.ones(batch, num_keys, dtype=torch.bool, device=key.device)
    return Units(
        query.to(wide).reshape(batch * own, heads // own, num_queries, dim),
        key.to(wide).reshape(batch * own, num_keys, dim),
        value.to(wide).reshape(batch * own, num_keys, value.shape[3]),
        mask.bias.detach()[:, :, 0].expand(batch, own, num_keys).reshape(batch * own, num_keys),
        real[:, None].expand(batch, own, num_keys).reshape(batch * own, num_keys),
    )


def find_expiries(numbers: Tensor, real: Tensor, keep: int) -> tuple[Tensor, Tensor]:
    """The expiry of each key, int32 [U, Nk], and at which positions a choice is tied, bool [U, Nk].

    numbers: [U, Nk], finite; real: bool [U, Nk], the keys that may be seen. A key that is not real
    has expiry 0. Equal numbers are dropped latest first, which is no more than a rule.
    """
    rows, num_keys = numbers.shape
    device = numbers.device
    values = numbers.masked_fill(~real, -torch.inf)
    values = torch.cat([values, values.new_full((rows, 1), -torch.inf)], 1)
    expiry = torch.full((rows, num_keys + 1), NEVER, dtype=torch.int32, device=device)
    tied = torch.zeros(rows, num_keys, dtype=torch.bool, device=device)
    carried = torch.empty(rows, 0, dtype=torch.int64, device=device)
    most_dropped = values.new_full((rows,), -torch.inf)
    for start in range(0, num_keys, STEP):
        stop = min(start + STEP, num_keys)
        new = torch.arange(start, stop, device=device)
        places = torch.cat([carried, new.expand(rows, -1)], 1)
        found, order = values.gather(1, places).sort(dim=1, descending=True, stable=True)
        places = places.gather(1, order)
        there = found > -torch.inf
        before = (places[:, None] <= new[:, None]) & there[:, None]  # [U, STEP, candidates]
        rank = before.cumsum(2, dtype=torch.int32)
        kept = before & (rank <= keep)
        last = found[:, None].masked_fill(~before | (rank != keep), -torch.inf).amax(2)
        following = found[:, None].masked_fill(~before | (rank != keep + 1), -torch.inf).amax(2)
        following = torch.maximum(following, most_dropped[:, None])
        tied[:, start:stop] = (following == last) & (last > -torch.inf)
        end = places.clamp(min=start) + kept.sum(1)
        dropped = there & (end < stop)
        expiry.scatter_(1, torch.where(dropped, places, num_keys), end.to(torch.int32))
        lost = found.masked_fill(~dropped, -torch.inf).amax(1)
        most_dropped = torch.maximum(most_dropped, lost)
        alive = torch.where(there & ~dropped, places, num_keys)
        carried = alive.sort(dim=1).values[:, :keep]
    return expiry[:, :num_keys].masked_fill(~real, 0), tied


def choose_keys(call: Units, mask: DynamicMask) -> tuple[Tensor, Tensor]:
    """Expiries and tied positions of a call, see `find_expiries`."""
    numbers, real = call.numbers, call.real
    if mask.early:
        best = torch.topk(numbers, min(mask.keep, numbers.shape[1]), -1, sorted=False).indices
        expiry = torch.zeros(numbers.shape, dtype=torch.int32, device=numbers.device)
        return expiry.scatter_(1, best, NEVER).masked_fill(~real, 0), torch.zeros_like(real)
    comparable = numbers.isfinite() & (numbers > mask.hidden)
    if not bool((comparable | ~real).all()):
        return torch.zeros_like(numbers, dtype=torch.int32), torch.ones_like(real)
    return find_expiries(numbers, real, mask.keep)


@dataclass(frozen=True, slots=True, eq=False)
class Strip:
    """Some rows of all units: lists of keys [U, M], and what rows see of them, [U, rows, M]."""

    rows: slice
    keys: Tensor
    visible: Tensor


def strips(
    expiry: Tensor, tied: Tensor, num_queries: int, offset: int, size: int
) -> Iterator[Strip]:
    """Rows that are not tied, `size` at a time, with every key that one of them sees."""
    count = expiry.shape[0]
    device = expiry.device
    carried = torch.arange(offset, device=device).expand(count, -1)
    for start in range(0, num_queries, size):
        stop = min(start + size, num_queries)
        rows = torch.arange(offset + start, offset + stop, device=device)
        places = torch.cat([carried, rows.expand(count, -1)], 1)
        ends = expiry.gather(1, places)
        seen = ends > places.clamp(min=offset + start)
        most = int(seen.sum(1).max())
        order = seen.to(torch.uint8).sort(dim=1, descending=True, stable=True).indices[:, :most]
        carried = places.gather(1, order)
        ends = ends.masked_fill(~seen, 0).gather(1, order)
        free = ~tied[:, offset + start : offset + stop]
        if most and bool(free.any()):
            visible = (carried[:, None] <= rows[:, None]) & (rows[:, None] < ends[:, None])
            yield Strip(slice(start, stop), carried, visible & free[:, :, None])


def tied_rows(call: Units, mask: DynamicMask, tied: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Of each unit some tied rows at a time: the unit, the rows, what they see, bool [rows, Nk].

    Their numbers are put together as the program does, and torch.topk chooses among them.
    """
    offset, num_keys = mask.query_offset, call.numbers.shape[1]
    positions = torch.arange(num_keys, device=tied.device)
    group, num_queries = call.query.shape[1:3]
    for unit, own in enumerate(tied[:, offset : offset + num_queries]):
        if not bool(own.any()):
            continue
        for rows in own.nonzero()[:, 0].split(max(1, CELLS // (num_keys * group))):
            seen = (positions <= rows[:, None] + offset) & call.real[unit]
            numbers = call.numbers[unit].expand(len(rows), -1).masked_fill(~seen, mask.hidden)
            best = torch.topk(numbers, min(mask.keep, num_keys), -1, sorted=False).indices
            yield unit, rows, torch.zeros_like(seen).scatter_(1, best, True) & seen


def strip_size(keep: int) -> int:
    """Rows per strip: more of them share the gathered keys where these are many."""
    return 64 if keep <= 256 else 128


def gathered(tensor: Tensor, keys: Tensor) -> Tensor:
    """Rows [U, M, D] of a tensor [U, Nk, D] at lists of keys [U, M]."""
    return tensor.gather(1, keys[:, :, None].expand(-1, -1, tensor.shape[2]))


def scores_of(query: Tensor, key: Tensor, numbers: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Scores [U, G, rows, M] of query [U, G, rows, D] and key [U, M, D]; hidden: minus infinity."""
    count, group, rows, dim = query.shape
    found = torch.baddbmm(
        numbers.to(query.dtype)[:, None],
        query.reshape(count, group * rows, dim),
        key.transpose(1, 2),
        alpha=scale,
    )
    return found.view(count, group, rows, -1).masked_fill_(~visible[:, None], -torch.inf)


def times(weights: Tensor, rows: Tensor) -> Tensor:
    """Weights [U, G, rows, M] times rows [U, M, D]."""
    count, group, num, width = weights.shape
    return (weights.reshape(count, group * num, width) @ rows).view(count, group, num, -1)


def dynamic_mask_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: DynamicMask, scale: float
) -> tuple[Tensor, Tensor]:
    """The output [B, H, Nq, Dv] and the log-sum-exps [B, H, Nq]; rows without a key are zeros.

    Time and memory are O(Nq * keep) but for tied rows, which take the time of dense attention.
    """
    call = units(query, key, value, mask)
    num_queries = query.shape[2]
    out = call.query.new_zeros(*call.query.shape[:3], value.shape[3])
    lse = call.query.new_full(call.query.shape[:3], -torch.inf)

    def attend(part: Tensor, own: Units, visible: Tensor) -> tuple[Tensor, Tensor]:
        scores = scores_of(part, own.key, own.numbers, visible, scale)
        sums = torch.logsumexp(scores, -1)
        weights = scores.sub_(sums.clamp(min=torch.finfo(sums.dtype).min)[..., None]).exp_()
        return times(weights, own.value), sums

    expiry, tied = choose_keys(call, mask)
    for strip in strips(expiry, tied, num_queries, mask.query_offset, strip_size(mask.keep)):
        own = listed(call, strip.keys)
        free = strip.visible.any(2)[:, None]
        found, sums = attend(call.query[:, :, strip.rows], own, strip.visible)
        out[:, :, strip.rows] = torch.where(free[..., None], found, out[:, :, strip.rows])
        lse[:, :, strip.rows] = torch.where(free, sums, lse[:, :, strip.rows])
    for unit, rows, visible in tied_rows(call, mask, tied):
        found, sums = attend(call.query[unit][None, :, rows], one(call, unit), visible[None])
        out[unit][:, rows], lse[unit][:, rows] = found[0], sums[0]
    whole, sums = empty_output(query, value), empty_lse(query)
    whole.copy_(out.view(whole.shape))
    sums.copy_(lse.view(sums.shape))
    return whole, sums


def dynamic_mask_backward(
    grad_out: Tensor,
    out: Tensor,
    lse: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: DynamicMask,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of query, key, value and bias, in their shapes and dtypes.

    None goes through the choice of keys. Sums over queries have a fixed order.
    """
    call = units(query, key, value, mask)
    wide = call.query.dtype
    grads = grad_out.to(wide).reshape(*call.query.shape[:3], -1)
    dots = (grad_out.to(wide) * out.to(wide)).sum(-1).reshape(call.query.shape[:3])
    sums = lse.to(wide).reshape(dots.shape).clamp(min=torch.finfo(wide).min)
    grad_query, grad_key, grad_value, grad_bias = (
        call.query.new_zeros(t.shape) for t in (call.query, call.key, call.value, call.numbers)
    )

    def differentiate(
        at: slice, rows: slice | Tensor, own: Units, visible: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        part, grad = call.query[at][:, :, rows], grads[at][:, :, rows]
        scores = scores_of(part, own.key, own.numbers, visible, scale)
        weights = scores.sub_(sums[at][:, :, rows, None]).exp_()
        change = times(grad, own.value.transpose(1, 2))
        change = change.sub_(dots[at][:, :, rows, None]).mul_(weights)
        turned = change.flatten(1, 2).transpose(1, 2)
        return (
            times(change, own.key) * scale,
            turned @ part.flatten(1, 2) * scale,
            weights.flatten(1, 2).transpose(1, 2) @ grad.flatten(1, 2),
            change.sum((1, 2)),
        )

    expiry, tied = choose_keys(call, mask)
    offset = mask.query_offset
    for strip in strips(expiry, tied, query.shape[2], offset, strip_size(mask.keep)):
        own = listed(call, strip.keys)
        parts = differentiate(slice(None), strip.rows, own, strip.visible)
        grad_query[:, :, strip.rows] += parts[0]
        add_rows(grad_key, strip.keys, parts[1])
        add_rows(grad_value, strip.keys, parts[2])
        grad_bias.scatter_add_(1, strip.keys, parts[3])
    for unit, rows, visible in tied_rows(call, mask, tied):
        at = slice(unit, unit + 1)
        parts = differentiate(at, rows, one(call, unit), visible[None])
        grad_query[unit][:, rows] = parts[0][0]
        grad_key[unit] += parts[1][0]
        grad_value[unit] += parts[2][0]
        grad_bias[unit] += parts[3][0]
    return (
        grad_query.view(query.shape).to(query.dtype),
        over_heads(grad_key, key).to(key.dtype),
        over_heads(grad_value, value).to(value.dtype),
        bias_gradient(grad_bias.view(query.shape[0], -1, key.shape[2]), mask.bias),
    )


def listed(call: Units, keys: Tensor) -> Units:
    """The units with the keys of lists [U, M] alone."""
    return Units(
        call.query,
        gathered(call.key, keys),
        gathered(call.value, keys),
        call.numbers.gather(1, keys),
        call.real,
    )


def one(call: Units, unit: int) -> Units:
    """One of the units."""
    own = slice(unit, unit + 1)
    return Units(call.query[own], call.key[own], call.value[own], call.numbers[own], call.real[own])


def add_rows(sums: Tensor, keys: Tensor, rows: Tensor) -> None:
    """Add rows [U, M, D] to sums [U, Nk, D] at lists of keys [U, M] without duplicates."""
    sums.scatter_add_(1, keys[:, :, None].expand(-1, -1, rows.shape[2]), rows)


def over_heads(gradient: Tensor, like: Tensor) -> Tensor:
    """Gradients [U, Nk, D] summed up over units that read the same kv head."""
    return gradient.view(*like.shape[:2], -1, *like.shape[2:]).sum(2)


def bias_gradient(gradient: Tensor, bias: Tensor) -> Tensor:
    """Gradients [B, units, Nk] in the shape and dtype of the bias."""
    if bias.shape[1] == 1:
        gradient = gradient.sum(1, keepdim=True)
    if bias.shape[0] == 1:
        gradient = gradient.sum(0, keepdim=True)
    if bias.shape[3] == 1:
        gradient = gradient.sum(2, keepdim=True)
    return gradient[:, :, None].to(bias.dtype)
