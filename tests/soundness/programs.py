"""Small programs composed at random of masks, writes, views, scores, caches and keywords.

A program is a tuple of names. `wrong` runs it in eager and compiled, with a pattern that selects
every key, and says how the two differ.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

import mpass

B, H, N, D = 2, 2, 128, 16
OPTIONS = {
    "pattern": mpass.VerticalSlash(1, 1 << 20),
    "dense_above": 2.0,
    "min_seq_len": 16,
    "inner_backend": "eager",
    "validate": "off",
}
BASES = ("tril", "arange", "where", "additive", "cut", "turned", "byte_tril")
EDITS = (
    "columns_seen", "columns_hidden", "rows_seen", "slice_off_end", "padding", "window",
    "foreach_zero", "masked_fill_", "logical_not_twice", "unsqueeze_", "transpose_write",
    "keyword_where", "keyword_where_swapped", "window_sinks", "compare_in_place", "copy_cast",
    "narrow_padding", "narrow_product", "listed_rows", "query_padding", "per_head", "per_row",
    "chunks", "dilated", "diagonal_write", "index_fill", "scatter", "alias_write", "late_write",
    "strided_write", "int_quotient", "alpha", "shifted_padding", "valid_length", "half_distance",
    "out", "xor_window", "wrapping_cast", "cut_cast",
)  # fmt: skip
BEFORE = (
    "", "relu_inplace", "leaky_keyword", "cache_foreach", "cache_setitem", "cache_index_copy",
    "scale_q", "one_head", "repeated_heads", "expanded_heads", "heads_last", "data_write",
)  # fmt: skip
SCORES = (
    "sdpa", "sdpa_additive", "sdpa_scale", "sdpa_both", "sdpa_one_zero", "plain", "einsum",
    "softcap", "sinks", "one_sink", "amax", "amax_softcap", "amax_sinks", "zeroed", "own_zeroed",
    "shifted", "half", "byte", "scaled_after", "flipped_after", "tensor_scale", "masked_twice",
    "by_where", "weights_twice", "dropout", "wrong_dim", "double_softmax", "negative_scale",
    "autocast",
)  # fmt: skip
BETWEEN = ("", "key_written", "key_restored", "query_written", "value_written")
AFTER = (
    "", "view_write", "masked_rows", "add", "contiguous_view", "flat_view", "alias_write", "vmap",
    "foreach_zero", "twice",
)  # fmt: skip


def drawn(edits=EDITS, before=BEFORE, scores=SCORES, after=AFTER, between=BETWEEN, bases=BASES):
    """Programs of these parts."""
    edit = st.tuples(st.sampled_from(edits), st.integers(0, 3))
    return st.tuples(
        st.sampled_from(bases),
        st.lists(edit, max_size=3),
        st.sampled_from(before),
        st.sampled_from(scores),
        st.sampled_from(between),
        st.sampled_from(after),
    )


programs = drawn()
FOUND = ("sdpa", "sdpa_additive", "plain", "einsum", "softcap", "sinks", "by_where", "amax")
likely = drawn(scores=FOUND * 4 + SCORES, between=("",) * 20 + BETWEEN)
"""Programs of which nearly half become sparse; of `programs` one in seven does."""


def tensors():
    """Query, key, value, padding, sinks, an empty cache and the padding as bytes."""
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(B, H, N, D, generator=generator) for _ in range(3))
    pad = torch.ones(B, N, dtype=torch.bool)
    pad[0, -9:] = False
    sinks = torch.randn(H, generator=generator)
    return query, key, value, pad, sinks, torch.zeros(B, H, N, D), pad.to(torch.uint8)


def base_mask(base):
    at = torch.arange(N)
    return {
        "tril": lambda: torch.ones(N, N, dtype=torch.bool).tril(),
        "arange": lambda: at[None] <= at[:, None],
        "where": lambda: torch.where(at[None] > at[:, None], 0, 1).bool(),
        "additive": lambda: torch.zeros(N, N).masked_fill(at[None] > at[:, None], -torch.inf) == 0,
        "cut": lambda: torch.ones(N + 9, N + 9).tril()[4 : N + 4, 4:-5] > 0,
        "turned": lambda: torch.ones(N, N, dtype=torch.bool).triu().mT,
        "byte_tril": lambda: torch.ones(N, N, dtype=torch.uint8).tril().bool(),
    }[base]()


def mask_of(base, edits, pad, small):
    mask = base_mask(base)
    for name, n in edits:
        mask = edited(mask, name, (0, 1, 7, 40)[n], pad, small)
    return mask


def edited(mask, name, size, pad, small):
    """A mask with one edit; some of these write to it."""
    at = torch.arange(N)
    distance = at[:, None] - at
    if name == "columns_seen":
        mask = mask.clone()
        mask[..., :size] = True
    elif name == "columns_hidden":
        mask = mask.clone()
        mask[..., 1 : 1 + size] = False
    elif name == "rows_seen":
        mask = mask.clone()
        mask[..., :size, :] = True
    elif name == "slice_off_end":
        mask = mask.clone()
        mask[..., N - size + 7 :] = False
    elif name == "padding":
        mask = mask & pad[:, None, None]
    elif name == "window":
        mask = mask & (distance < 8 + size)
    elif name == "window_sinks":
        near = distance < 30
        near[:, :size] = True
        mask = mask & near
    elif name == "foreach_zero":
        number = mask.int()
        torch._foreach_mul_([number[..., 1 : 1 + size]], 0)
        mask = number.bool()
    elif name == "masked_fill_":
        mask = mask.clone()
        mask.masked_fill_(at < size, True)
    elif name == "logical_not_twice":
        mask = mask.clone()
        mask.logical_not_()
        mask = ~mask
    elif name == "unsqueeze_":
        near = distance < 9 + size
        near.unsqueeze_(0).unsqueeze_(0)
        mask = mask & near
    elif name == "transpose_write":
        mask = mask.clone()
        mask.transpose(-1, -2)[..., 1 : 1 + size, :] = False
    elif name == "keyword_where":
        mask = torch.where(at < N - size, input=mask, other=torch.zeros_like(mask))
    elif name == "keyword_where_swapped":
        mask = torch.where(at < N - size, other=torch.zeros_like(mask), input=mask)
    elif name == "compare_in_place":
        number = mask.float()
        number.ge_(0.5)
        mask = number.bool()
    elif name == "copy_cast":
        mask = torch.empty_like(mask).copy_(mask.to(torch.bfloat16))
    elif name == "narrow_padding":
        mask = mask & (small[:, None, None].long() - 1 >= 0)
    elif name == "narrow_product":
        mask = mask & (small[:, None, None].to(torch.int32) * 300 > 200)
    elif name == "listed_rows":
        mask = mask & pad[[1, 0]][:, None, None]
    elif name == "query_padding":
        mask = mask & (pad[:, None, :, None] | (distance == 0))
    elif name == "per_head":
        mask = mask & (distance < torch.tensor([200, 9 + size])[:, None, None])
    elif name == "per_row":
        mask = mask & (distance < 5 + pad.sum(-1)[:, None, None, None] - 100)
    elif name == "chunks":
        mask = mask & (at[:, None] // (size + 5) == at // (size + 5))
    elif name == "dilated":
        mask = mask & (distance % (size + 1) == 0)
    elif name == "diagonal_write":
        mask = mask.clone()
        mask.diagonal(1, -2, -1).fill_(True)
    elif name == "index_fill":
        mask = mask.index_fill(-1, torch.tensor([size + 3]), True)
    elif name == "scatter":
        where = torch.full((*mask.shape[:-1], 1), size + 3)
        mask = mask.scatter(-1, where, True)
    elif name == "alias_write":
        mask = mask.clone()
        mask[..., :, :].logical_and_(distance < 9 + size)
    elif name == "late_write":
        own = mask.clone()
        mask = own[..., :]
        own.logical_and_(distance < 9 + size)
    elif name == "strided_write":
        mask = mask.clone()
        mask[..., 1 :: size + 2] = False
    elif name == "int_quotient":
        mask = mask & (torch.div(-distance, 8, rounding_mode="trunc") > -2 - size)
    elif name == "alpha":
        mask = mask & (torch.sub(at[:, None], at, alpha=1 + size % 2) < 40)
    elif name == "shifted_padding":
        mask = mask & F.pad(pad, (1, 0), value=True)[:, :-1][:, None, None]
    elif name == "valid_length":
        mask = mask & (at < N - size)
    elif name == "half_distance":
        mask = mask & ((distance / 2).long() < 6 + size)
    elif name == "out":
        mask = torch.logical_and(mask, distance < 9 + size, out=torch.empty_like(mask))
    elif name == "xor_window":
        mask = mask ^ (mask & (distance > 8 + size))
    elif name == "wrapping_cast":
        mask = torch.where(mask, 1, 257).to(torch.uint8) == 1
    elif name == "cut_cast":
        mask = torch.where(mask, 1.0, 1.5).long() == 1
    return mask


def prepared(before, query, key, value, cache):
    """Query, key and value after in-place ops, caches and repeats."""
    query = query * 1.0
    if before == "relu_inplace":
        F.hardswish(query, inplace=True)
    elif before == "leaky_keyword":
        F.leaky_relu(input=query, negative_slope=0.1, inplace=True)
    elif before == "cache_foreach":
        torch._foreach_copy_([cache], [key])
        key = cache
    elif before == "cache_setitem":
        cache[:, :, :N] = key
        key = cache
    elif before == "cache_index_copy":
        cache.index_copy_(2, torch.arange(N), value)
        value = cache
    elif before == "scale_q":
        query.mul_(0.5)
    elif before == "one_head":
        key, value = (t[:, 1:].repeat_interleave(H, dim=1) for t in (key, value))
    elif before == "repeated_heads":
        key, value = (t[:, :1].repeat(1, H, 1, 1) for t in (key, value))
    elif before == "expanded_heads":
        key, value = (
            t[:, :1, None].expand(B, 1, H, N, D).reshape(B, H, N, D) for t in (key, value)
        )
    elif before == "heads_last":
        query, key, value = (t.reshape(B, N, H, D).transpose(1, 2) for t in (query, key, value))
    elif before == "data_write":
        query.detach().mul_(0.5)
    return query, key, value


def attended(scores, between, query, key, value, mask, sinks):
    """Attention in one of its spellings, or what only looks like it."""
    if scores == "autocast":
        with torch.autocast("cpu", torch.bfloat16):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    if scores.startswith("sdpa"):
        given = {"attn_mask": mask}
        if scores == "sdpa_additive":
            given = {"attn_mask": torch.zeros(mask.shape).masked_fill_(~mask, -torch.inf)}
        elif scores == "sdpa_scale":
            given["scale"] = 0.7
        elif scores == "sdpa_both":
            square = mask.expand(B, H, N, N)  # Torch refuses masks of three dimensions here.
            given = {"attn_mask": square | square.mT, "is_causal": True}
        elif scores == "sdpa_one_zero":
            number = mask.float()
            given = {"attn_mask": number.ge_(0.5)}
        return F.scaled_dot_product_attention(query, key, value, **given)
    key, turned = key * 1.0, None
    if between == "key_restored":
        turned = torch.zeros_like(key.mT)
    turned = key.transpose(-1, -2) if turned is None else turned
    s = torch.einsum("bhqd,bhdk->bhqk", query, turned) if scores == "einsum" else query @ turned
    s = s * (-0.2 if scores == "negative_scale" else 0.2)
    if between == "key_written":
        key.copy_(value)
    elif between == "key_restored":
        turned.copy_(key.mT)
    elif between == "query_written":
        query.zero_()
    elif between == "value_written":
        value = value * 1.0
        value.neg_()
    if scores == "tensor_scale":
        s = s * sinks.exp().view(1, H, 1, 1)
    if scores == "amax_softcap":
        s = s - s.amax(-1, keepdim=True)
    if scores in ("softcap", "amax_softcap"):
        s = 0.5 * torch.tanh(s / 0.5)
    elif scores == "zeroed":
        s = s.masked_fill(torch.arange(N) % 3 == 0, 0.0)
    elif scores == "own_zeroed":
        s = s.masked_fill(torch.eye(N, dtype=torch.bool), 0.0)
    elif scores == "shifted":
        s = s + 1.0
    elif scores == "half":
        s = s.half().float()
    elif scores == "byte":
        s = s.to(torch.int8).float()
    hidden = torch.finfo(s.dtype).min
    if scores == "by_where":
        s = torch.where(mask, other=torch.full((), hidden), input=s)
    else:
        s = s.masked_fill(~mask, hidden)
    if scores == "masked_twice":
        s = s.masked_fill(~mask, -torch.inf)
    if scores in ("scaled_after", "flipped_after"):
        s = s * (-0.5 if scores == "flipped_after" else 0.5)
    if scores in ("amax", "amax_sinks"):
        s = s - s.amax(-1, keepdim=True)
    if scores in ("sinks", "one_sink", "amax_sinks"):
        column = sinks[:1] if scores == "one_sink" else sinks
        column = column.view(1, -1, 1, 1).expand(B, H, N, 1)
        return torch.cat([s, column], -1).softmax(-1)[..., :-1] @ value
    if scores == "wrong_dim":
        return torch.softmax(s, dim=-2) @ value
    weights = torch.softmax(input=s, dim=-1)
    if scores == "double_softmax":
        weights = weights.softmax(-1)
    if scores == "dropout":
        weights = F.dropout(weights, 0.3, training=True)
    out = weights @ value
    return out + weights[..., :1] if scores == "weights_twice" else out


def finished(after, out, pad):
    """What a program does with attention's output."""
    if after == "view_write":
        out[:, :, 0].zero_()
    elif after == "masked_rows":
        out.transpose(1, 2).masked_fill_(~pad[:, :, None, None], 0.0)
    elif after == "add":
        out = out + 1
    elif after == "contiguous_view":
        out = out.transpose(1, 2).reshape(B, N, -1)
    elif after == "flat_view":
        out = out.contiguous().view(B * H, N, D).view(B, H, N, D)
    elif after == "alias_write":
        flat = out.transpose(1, 2)
        out.mul_(2)
        out = flat.transpose(1, 2) + 1
    elif after == "vmap":
        out = torch.vmap(torch.sin)(out)
    elif after == "foreach_zero":
        torch._foreach_zero_([out[:, 0]])
    elif after == "twice":
        out = out + out.flip(1)
    return out


def program(spec):
    """The function that a tuple of names stands for."""
    base, edits, before, scores, between, after = spec

    def run(query, key, value, pad, sinks, cache, small):
        query, key, value = prepared(before, query, key, value, cache)
        mask = mask_of(base, edits, pad, small)
        out = finished(after, attended(scores, between, query, key, value, mask, sinks), pad)
        # Rows whose keys are all hidden by a finite number are ours to choose: docs/soundness.md.
        seen = mask.expand(B, H, N, N).any(-1)
        if after == "twice":
            seen = seen.all(1, keepdim=True).expand(B, H, N)
        return out, cache, seen

    return run


def wrong(spec, **options) -> str:
    """What is wrong with a compiled program; "" if it does what eager does."""
    function = program(spec)
    mine, theirs = tensors(), tensors()
    torch._dynamo.reset()
    with torch.no_grad():
        torch.manual_seed(0)
        expected, cache, seen = function(*theirs)
        torch.manual_seed(0)
        try:
            compiled = torch.compile(function, backend="minference", options=OPTIONS | options)
            out, written, _ = compiled(*mine)
        except Exception as error:  # Eager runs it: whatever it is, it is ours.
            return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return "another shape or dtype"
    if not torch.equal(cache, written):
        return "the cache differs"
    difference = (out - expected).abs().float()
    difference = difference[seen] if difference.dim() == 4 else difference[seen.all(1)]
    limit = 1e-3 if out.dtype == torch.float32 else 0.05
    if bool((difference < limit).all()):
        return ""
    return f"differs by {float(difference.max()):.3g}"
