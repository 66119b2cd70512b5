"""What a proof claims of a mask and of scores, as values to compare with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from mpass.graph.nodes import MADE_HERE, example
from mpass.graph.site import AttentionSite, KeptKeys, MaskMeaning
from mpass.lowering.distance_bias import bias_rows
from mpass.lowering.index import AttentionMask
from mpass.lowering.key_bias import as_rows
from mpass.lowering.mask_forms import HIDDEN
from mpass.lowering.reference.attention import allowed_cells, repeat_kv
from mpass.match.repeat_kv import made_from
from mpass.validation.slices import (
    NotRunError,
    Run,
    shape_now,
    size_now,
)


def claim_key(site: AttentionSite) -> tuple[Any, ...]:
    """What a site claims, comparable between layers of one graph."""
    mask = site.mask or MaskMeaning(causal=False)
    inputs = (*map(shape_now, (site.query, site.key, site.value)), site.compute_dtype)
    numbers = (site.scale, site.softcap, site.sinks is None, site.output_transposed, site.kept)
    meaning = (site.read_mask, mask.causal, str(mask.query_offset), mask.window, mask.key_mask)
    biases = (site.key_bias, site.bias_factor, site.distance_bias)
    return (*inputs, *numbers, *meaning, str(mask.valid_keys), *biases)


def claimed_cells(mask: MaskMeaning | None, run: Run, site: AttentionSite, rows: Tensor) -> Tensor:
    """The cells [B or 1, 1, rows, Nk] that the claim lets be seen."""
    if site.read_mask is not None:
        return read_cells(site.read_mask, run)
    assert mask is not None
    if isinstance(mask.query_offset, fx.Node):
        raise NotRunError("the position of the first query is a tensor")
    device = example(site.query).device
    offset = size_now(mask.query_offset)
    num_keys = shape_now(site.key)[2]
    padding = None if mask.key_mask is None else run.whole(mask.key_mask)
    words = AttentionMask(mask.causal, offset, mask.window, padding)
    cells = allowed_cells(words, rows.to(device) + offset, num_keys)
    if mask.valid_keys is not None:
        cells = cells & (torch.arange(num_keys, device=device) < size_now(mask.valid_keys))
    return cells if site.kept is None else kept_cells(site, site.kept, cells, run)


def kept_cells(site: AttentionSite, kept: KeptKeys, cells: Tensor, run: Run) -> Tensor:
    """Of cells [B or 1, 1, rows, Nk] those that each row keeps: [B, H, rows, Nk]."""
    assert site.key_bias is not None
    heads = shape_now(site.query)[1]
    bias = run.whole(site.key_bias)
    numbers = bias.expand(-1, -1, cells.shape[2], -1).masked_fill(~cells, kept.hidden)
    best = numbers.topk(min(kept.keep, cells.shape[3]), -1, sorted=False).indices
    marks = torch.zeros_like(numbers, dtype=torch.bool).scatter_(-1, best, True)
    return repeat_kv(marks & cells, heads)


def read_cells(mask: fx.Node, run: Run) -> Tensor:
    """The cells [B or 1, H or 1, rows, Nk] that a mask shows that is read at run time."""
    cells = run.strip(mask)
    cells = cells[(None,) * (4 - cells.dim())]
    return cells if cells.dtype == torch.bool else cells > HIDDEN


def unfolded_rows(cells: Tensor, site: AttentionSite) -> Tensor:
    """Rows of a tensor [.., rows, Nk] of folded scores as [B, H, rows, Nk]."""
    whole = cells.expand(*shape_now(site.output)[:-2], *cells.shape[-2:])
    return whole.reshape(*shape_now(site.query)[:2], *cells.shape[-2:])


def claimed_scores(site: AttentionSite, run: Run, rows: Tensor) -> Tensor:
    """Scores [B, H, rows, Nk] before any mask that is proven, in fp64.

    A mask that is read at run time is claimed to be added to them, or to hide, and nothing else.
    """
    query, key = run.whole(site.query), run.whole(site.key)
    query = query.index_select(2, rows.to(query.device)).double()
    key = repeat_kv(key, query.shape[1]).double()
    scores = query @ key.transpose(-1, -2) * site.scale
    if site.distance_bias is not None:
        scores = scores + claimed_bias(site, run, rows).double()
    scores = site.softcap * torch.tanh(scores / site.softcap) if site.softcap > 0 else scores
    if site.key_bias is not None:
        bias = as_rows(run.whole(site.key_bias).double(), *query.shape[:2])
        if bias.shape[1] > 1:  # a number per kv head counts for its query heads
            bias = repeat_kv(bias, query.shape[1])
        scores = scores + bias[:, :, None] * site.bias_factor
    added = site.read_mask
    if added is None or example(added).dtype == torch.bool:
        return scores
    return scores + run.strip(added).double()


def claimed_bias(site: AttentionSite, run: Run, rows: Tensor) -> Tensor:
    """What a bias by distance is claimed to add to the scores of some rows: [H or 1, rows, Nk]."""
    assert site.distance_bias is not None
    line = run.whole(site.distance_bias)
    queries, keys = shape_now(site.query)[2], shape_now(site.key)[2]
    return bias_rows(line, rows.to(line.device), queries, 0, keys)


def has_bias(site: AttentionSite) -> bool:
    """Whether a bias is added to scores, which may be larger than these."""
    return site.key_bias is not None or site.distance_bias is not None


def tolerance(site: AttentionSite) -> float:
    """Largest relative difference that rounding makes in the dtype that the site computes in.

    Under autocast this is another one than the query's.
    """
    return {torch.float32: 1e-4, torch.float64: 1e-8}.get(site.compute_dtype, 0.1)


def mask_inputs(site: AttentionSite) -> list[fx.Node]:
    """The tensors that a claim about a mask reads: the key mask, or the mask itself; a bias."""
    bias = [each for each in (site.key_bias, site.distance_bias) if each is not None]
    if site.read_mask is not None:
        return [site.read_mask, *bias]
    return [*bias, site.mask.key_mask] if site.mask is not None and site.mask.key_mask else bias


def operands(site: AttentionSite) -> list[fx.Node]:
    """What a site reads: query, key, value and sinks."""
    return [site.query, site.key, site.value, *([] if site.sinks is None else [site.sinks])]


def attention_inputs(site: AttentionSite) -> list[fx.Node]:
    """The tensors of the graph behind what a site reads: where the part that is run begins."""
    return [made_from(node) for node in operands(site)]


def made_operands(site: AttentionSite) -> list[fx.Node]:
    """Operands that a matcher has made of tensors of the graph, by views or by repetition."""
    return [node for node in operands(site) if MADE_HERE in node.meta]
