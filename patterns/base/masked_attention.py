"""Attention under a mask that is read at run time: `minference::masked_attention`.

It runs sparse where the mask has a form that the kernels know (lowering/mask_forms.py), and dense
under the very mask where it has none. Estimation stands inside of the op, unlike that of
mpass.patterns.base.op: the position of the first query decides how many blocks an index has, and it
is read from the mask.

Letters: B batch, H query heads, Hk kv heads, Nq queries, Nk keys, D head_dim, Dv value dim.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from mpass.lowering import recorder
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.index import AttentionMask
from mpass.lowering.mask_forms import (
    EVERY,
    SEGMENTS,
    SPANS,
    UNKNOWN,
    MaskForm,
    ReadMask,
    outside_spans,
)
from mpass.lowering.mask_op import as_four
from mpass.lowering.meter import start_prompt
from mpass.lowering.readback import Readback
from mpass.lowering.reference.attention import empty_output, repeat_kv
from mpass.patterns.base.layer import attend_heads, groups_of
from mpass.patterns.base.pattern import Pattern
from mpass.patterns.base.registry import find_pattern

CHUNK = 256
"""Rows that are computed at a time where scores are written out."""

FEWEST_QUERIES = 128
"""A span of fewer queries is dense: to estimate what it sees would cost as much as it saves."""

NO_FORM = "its mask, read at run time, has no form that the kernels know"
NOT_CAUSAL = "its mask, read at run time, is not causal, and a pattern is defined for causal only"
BY_DEFAULT = "its mask, read at run time, is not causal: dense by default, as such is diffuse"
IN_A_SPAN = "queries of a span that sees itself (an image, a prefix) attend densely"


def patterns_as_text(patterns: Sequence[Pattern]) -> str:
    """The pattern of each head as an argument of an op; `patterns_from_text` reads it."""
    kinds = list(dict.fromkeys(patterns))
    written = [[kind.name, dict(kind.parameters())] for kind in kinds]
    return json.dumps([written, [kinds.index(pattern) for pattern in patterns]])


@functools.lru_cache(maxsize=256)
def patterns_from_text(text: str) -> tuple[Pattern, ...]:
    """The pattern of each head from what `patterns_as_text` has written."""
    written, heads = json.loads(text)
    kinds = [find_pattern(name)(**fields) for name, fields in written]
    return tuple(kinds[place] for place in heads)


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """What an attention is computed with beside its tensors; fields as the op's arguments."""

    patterns: tuple[Pattern, ...]
    sinks: Tensor | None
    scale: float
    softcap: float
    written_out: bool
    dense_above: float
    min_seq_len: int
    layer: int
    measured: int
    causal_only: bool
    most_lost: float
    int8: bool


@define_op(
    "masked_attention",
    "(Tensor query, Tensor key, Tensor value, Tensor mask, Tensor form, Tensor key_mask, "
    "Tensor first, Tensor last, Tensor? sinks, str patterns, float scale, float softcap, "
    "bool written_out, float dense_above, SymInt min_seq_len, int layer, int measured=0, "
    "bool causal_only=False, float most_lost=1.0, bool int8=False) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),
)
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    form: Tensor,
    key_mask: Tensor,
    first: Tensor,
    last: Tensor,
    sinks: Tensor | None,
    patterns: str,
    scale: float,
    softcap: float,
    written_out: bool,
    dense_above: float,
    min_seq_len: int,
    layer: int,
    measured: int = 0,
    causal_only: bool = False,
    most_lost: float = 1.0,
    int8: bool = False,
) -> Tensor:
    """Attention under `mask`, sparse where its form allows it.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] -> [B, H, Nq, Dv], laid out as
    [B, Nq, H, Dv]. mask: [.., Nq, Nk], bool or added to the scores. form, key_mask, first,
    last: of minference::read_mask. patterns: of `patterns_as_text`. written_out: whether the
    program spells its softmax out, so that a row of minus infinities is NaN, as there.
    causal_only: whether what turns out to see both ways is dense, since nobody named the patterns.
    The others are those of minference::sparse_attention.
    """
    own = patterns_from_text(patterns)
    read = MaskForm.from_tensor(form)
    limits = (dense_above, min_seq_len, layer, -measured, causal_only, most_lost, int8)
    request = Request(own, sinks, scale, softcap, written_out, *limits)
    if measured and read.offset == 0:
        start_prompt(measured)
    cells = as_four(mask)
    if read.kind == UNKNOWN:
        return attend_densely(query, key, value, cells, request, NO_FORM)
    if read.kind == EVERY and causal_only:
        return attend_densely(query, key, value, cells, request, BY_DEFAULT)
    if read.kind == EVERY and not all(pattern.bidirectional for pattern in own):
        return attend_densely(query, key, value, cells, request, NOT_CAUSAL)
    batch, num_queries = query.shape[0], query.shape[2]
    key_mask, first, last = (each.expand(batch, -1) for each in (key_mask, first, last))
    padding = key_mask if read.padded else None
    if read.kind == EVERY:
        out = attend(query, key, value, AttentionMask(False, 0, 0, padding), request)
    elif read.kind == SEGMENTS:
        out = empty_output(query, value)
        for rows, start, stop, begin in segments(first):
            end = read.offset + stop
            part = AttentionMask(
                True,
                read.offset + start - begin,
                0,
                None if padding is None else padding[rows, begin:end],
            )
            queries = query[rows, :, start:stop]
            keys, values = key[rows, :, begin:end], value[rows, :, begin:end]
            out[rows, :, start:stop] = attend(queries, keys, values, part, request)
    elif read.kind == SPANS:
        out = attend_spans(query, key, value, cells, ReadMask(read, key_mask, first, last), request)
    else:
        end = read.offset + num_queries
        padding = None if padding is None else padding[:, :end]
        seen = AttentionMask(True, read.offset, read.window, padding)
        out = attend(query, key[:, :, :end], value[:, :, :end], seen, request)
    if read.empty and mask.dtype != torch.bool:
        read_tensors = ReadMask(read, key_mask, first, last)
        fill_empty_rows(out, query, key, value, cells, read_tensors, request)
    return out


@fake_of("masked_attention")
def _(query: Tensor, key: Tensor, value: Tensor, *rest: object) -> Tensor:
    return empty_output(query, value)


def segments(first: Tensor) -> Iterator[tuple[slice, int, int, int]]:
    """Batch rows, first query, end of queries and first key of each run of equal starts.

    first: [B, Nq]. Batch rows are taken together where they have the same segments.
    """
    batch = first.shape[0]
    same = bool((first == first[:1]).all())
    for rows in [slice(0, batch)] if same else [slice(b, b + 1) for b in range(batch)]:
        values, counts = first[rows.start].unique_consecutive(return_counts=True)
        start = 0
        for begin, count in zip(values.tolist(), counts.tolist(), strict=True):
            yield rows, start, start + count, begin
            start += count


def attend_spans(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, read: ReadMask, request: Request
) -> Tensor:
    """Attention that is causal but within spans, whose queries see all of their span.

    One sparse causal attention serves what stands outside of the spans (and between them, which
    is cheaper than a call for each stretch). Then each span replaces its rows: by sparse attention
    that is not causal where the patterns are defined for that and no window cuts it, else densely.
    """
    out = empty_output(query, value)
    offset, window = read.form.offset, read.form.window
    positions = torch.arange(query.shape[2], device=query.device) + offset
    bidirectional = window == 0 and all(p.bidirectional for p in request.patterns)
    bidirectional = bidirectional and not request.causal_only
    for rows in [slice(b, b + 1) for b in range(query.shape[0])]:
        own = (query[rows], key[rows], value[rows])
        cells = mask[rows] if mask.shape[0] > 1 else mask
        last = read.last[rows.start]
        alone = outside_spans(last, positions).nonzero()[:, 0]
        if len(alone):
            start, stop = int(alone[0]), int(alone[-1]) + 1
            end = offset + stop
            hidden = read.key_mask[rows, :end] if read.form.padded else None
            seen = AttentionMask(True, offset + start, window, hidden)
            queries, keys, values = own[0][:, :, start:stop], own[1][:, :, :end], own[2][:, :, :end]
            out[rows, :, start:stop] = attend(queries, keys, values, seen, request)
        ends, counts = last.unique_consecutive(return_counts=True)
        start = 0
        for end, count in zip((ends + 1).tolist(), counts.tolist(), strict=True):
            stop = start + count
            if count > 1 or end > offset + stop:
                begin = int(read.first[rows.start, start])
                part = (own[0][:, :, start:stop], own[1][:, :, begin:end], own[2][:, :, begin:end])
                if bidirectional and count >= FEWEST_QUERIES:
                    seen = AttentionMask(False, 0, 0, read.key_mask[rows, begin:end])
                    out[rows, :, start:stop] = attend(*part, seen, request)
                else:
                    strip = cells[:, :, start:stop, begin:end]
                    out[rows, :, start:stop] = attend_densely(*part, strip, request, IN_A_SPAN)
            start = stop
    return out


def attend(
    query: Tensor, key: Tensor, value: Tensor, mask: AttentionMask, request: Request
) -> Tensor:
    """Estimation and sparse attention under a mask in words, by the ops of rewritten graphs."""
    return attend_heads(
        *(query, key, value, groups_of(request.patterns, query.shape[1] // key.shape[1]), mask),
        scale=request.scale,
        softcap=request.softcap,
        sinks=request.sinks,
        dense_above=request.dense_above,
        min_seq_len=request.min_seq_len,
        layer=request.layer,
        measured=request.measured,
        most_lost=request.most_lost,
        int8=request.int8,
    )


def attend_densely(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, request: Request, reason: str
) -> Tensor:
    """Dense attention under a mask [B or 1, H or 1, Nq, Nk], told to the log."""
    log = recorder.active_log()
    if log is not None:
        log.dense_reason = ""
        log.calls.append(
            recorder.AttentionCall(
                layer=request.layer,
                lowering="dense",
                computed=Readback(torch.ones(query.shape[:2], dtype=torch.float64)),
                num_queries=query.shape[2],
                num_keys=key.shape[2],
                index_bytes=0,
                reason=reason,
            )
        )
    out = empty_output(query, value)
    plain = request.softcap == 0 and request.sinks is None and not request.written_out
    if plain and mask.dtype in (torch.bool, query.dtype):
        return out.copy_(
            F.scaled_dot_product_attention(
                query, key, value, attn_mask=mask, scale=request.scale, enable_gqa=True
            )
        )
    for start in range(0, query.shape[2], CHUNK):
        rows = slice(start, start + CHUNK)
        out[:, :, rows] = written_out(query[:, :, rows], key, value, mask[:, :, rows], request)
    return out


def written_out(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, request: Request
) -> Tensor:
    """Attention of some rows, step by step in fp32: [B, H, rows, Dv].

    Of a row of minus infinities SDPA makes zeros and a softmax NaN.
    """
    heads = query.shape[1]
    scores = query.float() @ repeat_kv(key, heads).float().mT * request.scale
    if request.softcap > 0:
        scores = request.softcap * torch.tanh(scores / request.softcap)
    hidden = ~mask if mask.dtype == torch.bool else mask == -torch.inf
    scores = scores.masked_fill(hidden, -torch.inf)
    if mask.dtype != torch.bool:
        scores = scores + mask.float().masked_fill(hidden, 0.0)
    if request.sinks is not None:
        column = request.sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
    else:
        weights = torch.softmax(scores, -1)
    if not request.written_out:
        weights = weights.masked_fill(hidden.all(-1, keepdim=True), 0.0)
    return (weights @ repeat_kv(value, heads).float()).to(query.dtype)


def fill_empty_rows(
    out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor,
    read: ReadMask,
    request: Request,
) -> None:
    """Compute the rows that see no key, which sparse attention leaves 0, as the program does.

    Where keys are hidden by a finite number such a row is a mean of values, and what follows may
    read it.
    """
    batch = query.shape[0]
    before = F.pad(read.key_mask.long().cumsum(-1), (1, 0))
    empty = before.gather(1, read.last + 1) == before.gather(1, read.first)
    mask = mask.expand(batch, *mask.shape[1:])
    for b in range(batch):
        for rows in empty[b].nonzero()[:, 0].split(CHUNK):
            part = (query[b : b + 1, :, rows], key[b : b + 1], value[b : b + 1])
            out[b, :, rows] = written_out(*part, mask[b : b + 1, :, rows], request)[0]
