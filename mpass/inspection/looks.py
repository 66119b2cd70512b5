"""What heads look at from single query tokens: the keys they took, and the exact weights.

A prompt has too many queries to keep all of them; some stand for it, the last one among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mpass.inspection.recall import evenly_spaced, linear_levels, log_levels, selected_keys
from mpass.lowering.index import BLOCK, first_query_block
from mpass.lowering.recorder import CallInputs
from mpass.lowering.reference import attention as reference

MOST_QUERIES = 16
"""Query tokens that stand for a prompt where none are asked for."""

MOST_KEYS = 16
"""Keys of each that are kept: those with the largest exact weights."""

BINS = 64
"""Cells of the strip that shows all keys of a query."""


@dataclass(frozen=True, eq=False)
class QueryLooks:
    """Some queries of one layer, in the first row of the batch.

    Letters: H heads, Q queries, K keys kept of each, R cells of a strip.

    queries: positions of the query tokens. keys: int64 [H, Q, K], the keys with the largest exact
    weights, -1 where a query sees fewer. weights: fp32 [H, Q, K], the exact attention on them.
    taken: bool [H, Q, K], whether the head takes them. kept: fp64 [H, Q], the exact attention on
    all keys that it takes. count: int64 [H, Q], how many these are; seen: int64 [Q], how many it
    may see. strip_taken, strip_exact: uint8 [H, Q, R], levels over all keys as in the maps of
    mpass.inspection.recall: the share of keys that are taken, and their exact attention.
    """

    queries: tuple[int, ...]
    keys: Tensor
    weights: Tensor
    taken: Tensor
    kept: Tensor
    count: Tensor
    seen: Tensor
    strip_taken: Tensor
    strip_exact: Tensor

    def only(self, chosen: Sequence[int]) -> QueryLooks:
        """The looks of some of the queries, by their places in `queries`."""
        place = torch.tensor(list(chosen), dtype=torch.int64)
        return QueryLooks(
            queries=tuple(self.queries[i] for i in chosen),
            keys=self.keys[:, place],
            weights=self.weights[:, place],
            taken=self.taken[:, place],
            kept=self.kept[:, place],
            count=self.count[:, place],
            seen=self.seen[place],
            strip_taken=self.strip_taken[:, place],
            strip_exact=self.strip_exact[:, place],
        )


def choose_queries(num_queries: int, offset: int, wanted: Sequence[int] = ()) -> tuple[int, ...]:
    """Positions of the queries to look at: those that are wanted, else spread over the prompt.

    offset: the position of the first query. Positions outside of the prompt are left out.
    """
    if wanted:
        return tuple(sorted({p for p in wanted if offset <= p < offset + num_queries}))
    return tuple(offset + row for row in evenly_spaced(num_queries, MOST_QUERIES))


@torch.no_grad()
def measure_looks(operands: CallInputs, queries: Sequence[int]) -> QueryLooks:
    """Look from some queries, positions on the keys' axis, at what the heads of a layer see."""
    query, mask, index = operands.query[:1], operands.mask, operands.index
    heads, num_keys = query.shape[1], operands.key.shape[2]
    keys = reference.repeat_kv(operands.key[:1], heads).float()
    columns = reference.selected_columns(index, operands.query.shape[0], num_keys)
    first = first_query_block(mask.query_offset)
    most = min(MOST_KEYS, num_keys)
    found: list[tuple[Tensor, ...]] = []
    for position in queries:
        block = position // BLOCK
        chosen = selected_keys(index, mask, columns, block - first, block)[0]
        places = torch.tensor([position], device=query.device)
        allowed = reference.allowed_cells(mask, places, num_keys)[0].expand(heads, -1, -1)[:, 0]
        row = query[:, :, position - mask.query_offset, None].float() * operands.scale
        scores = (row @ keys.mT)[0, :, 0]
        if operands.softcap > 0:
            scores = operands.softcap * torch.tanh(scores / operands.softcap)
        scores = scores.double().masked_fill(~allowed, -torch.inf)
        if operands.sinks is not None:
            scores = torch.cat([scores, operands.sinks.double()[:, None]], -1)
        weights = torch.softmax(scores, -1).nan_to_num(0.0)[:, :num_keys]
        taken = chosen & allowed
        heaviest, at = weights.topk(most, -1)
        visible = allowed.gather(-1, at)
        found.append(
            (
                torch.where(visible, at, -1),
                heaviest.float(),
                taken.gather(-1, at) & visible,
                (weights * taken).sum(-1),
                taken.sum(-1),
                allowed[0].sum(),
                linear_levels(strip(taken.double(), allowed)),
                log_levels(strip_sum(weights)),
            )
        )
    parts = [[each.cpu() for each in part] for part in zip(*found, strict=True)]
    keys_, heavy, taken_, kept, count, seen, share, exact = parts
    return QueryLooks(
        queries=tuple(queries),
        keys=torch.stack(keys_, 1),
        weights=torch.stack(heavy, 1),
        taken=torch.stack(taken_, 1),
        kept=torch.stack(kept, 1),
        count=torch.stack(count, 1),
        seen=torch.stack(seen),
        strip_taken=torch.stack(share, 1),
        strip_exact=torch.stack(exact, 1),
    )


def bins_of(num_keys: int, device: torch.device) -> Tensor:
    """The cell of a strip that each key lies in: int64 [Nk]."""
    return torch.arange(num_keys, device=device) * BINS // num_keys


def strip_sum(per_key: Tensor) -> Tensor:
    """Sums over the cells of a strip: [H, Nk] -> fp64 [H, R]."""
    cells = torch.zeros(per_key.shape[0], BINS, dtype=torch.float64, device=per_key.device)
    return cells.index_add_(1, bins_of(per_key.shape[1], per_key.device), per_key.double())


def strip(per_key: Tensor, allowed: Tensor) -> Tensor:
    """Means over the visible keys of each cell: [H, Nk] -> fp64 [H, R]."""
    return strip_sum(per_key) / strip_sum(allowed.double()).clamp(min=1)
