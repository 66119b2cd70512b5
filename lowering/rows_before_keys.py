"""Rows of causal attention whose keys a bias hides by numbers, as eager attention computes them.

A text mask made of numbers hides keys that stand before the first one, and causality those after a
query. Where both do so by finite numbers, a row that sees no key is no mean of nothing: what eager
attention makes of it depends on which number is the larger. These rows, which are padding as a
rule, are computed again, each key with the very number that eager attention gives it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.lowering.define import NAMESPACE
from mpass.lowering.key_bias import as_rows

MARGIN = 4096.0
"""A row is computed again whose best key has a bias of so much more at most than what is ahead."""

STRIP = 256
"""Rows at a time."""

ADDED, REPLACED, REPLACED_FIRST, NOT_BIASED = "added", "replaced", "replaced first", "not biased"
"""What a key ahead of a query gets: a number added to score and bias, in the place of both, in the
place of the score, to which the bias is then added, or in the place of the bias."""


@torch.library.custom_op(
    f"{NAMESPACE}::fill_rows_before_keys",
    mutates_args=("out",),
    schema="(Tensor(a!) out, Tensor query, Tensor key, Tensor value, Tensor bias, float factor, "
    "SymInt query_offset, float scale, float number, str ahead) -> ()",
)
def fill_rows_before_keys(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor,
    factor: float,
    query_offset: int,
    scale: float,
    number: float,
    ahead: str,
) -> None:
    """Overwrite the rows of `out` whose own keys weigh no more than those ahead of them.

    out: [B, H, Nq, Dv]; query: [B, H, Nq, D]; key, value: [B, Hk, Nk, D or Dv]. bias: as
    `with_key_bias` reads it, times a factor. query_offset: position of the first query. number:
    what hides keys ahead of a query; ahead: how. Where the first key is seen, that is all that is
    looked at. ALiBi's numbers are low as well, but far above those that hide.
    """
    batch, heads, num_queries, _ = query.shape
    num_keys = key.shape[2]
    rows = as_rows(bias, batch, heads)
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32)) * factor
    most = rows.amax(-1) if ahead in (ADDED, REPLACED_FIRST) else rows.new_zeros(rows.shape[:2])
    least = most + number + MARGIN  # rounded as the sum itself is
    if bool((rows[..., 0] > least).all()):
        return
    best = rows.expand(*rows.shape[:2], num_keys).cummax(-1).values
    hidden = (best <= least[..., None]).sum(-1)  # positions before the first key that is seen
    group = heads // key.shape[1]
    for b in range(batch):
        for h in range(heads):
            row = rows[b % rows.shape[0], own_head(h, heads, rows.shape[1])].expand(num_keys)
            count = hidden[b % rows.shape[0], own_head(h, heads, rows.shape[1])]
            last = min(int(count) - query_offset, num_queries)
            for start in range(0, last, STRIP):
                some = slice(start, min(start + STRIP, last))
                scores = query[b, h, some].float() @ key[b, h // group].float().T * scale
                weights = weights_of(scores, row, start + query_offset, number, ahead)
                out[b, h, some] = (weights @ value[b, h // group].float()).to(out.dtype)


def own_head(head: int, heads: int, count: int) -> int:
    """Which of `count` biases a query head reads: the one of all, of its kv head, or its own."""
    return head * count // heads


def weights_of(scores: Tensor, bias: Tensor, first: int, number: float, ahead: str) -> Tensor:
    """Weights of rows [R, Nk] from position `first` on, of their scores and a bias [Nk]."""
    positions = torch.arange(first, first + scores.shape[0], device=scores.device)[:, None]
    seen = torch.arange(scores.shape[1], device=scores.device) <= positions
    biased = scores + bias
    other = {
        ADDED: biased + number,
        REPLACED: torch.full_like(biased, number),
        REPLACED_FIRST: (bias + number).expand_as(biased),
        NOT_BIASED: scores + number,
    }[ahead]
    return torch.where(seen, biased, other).softmax(-1)
