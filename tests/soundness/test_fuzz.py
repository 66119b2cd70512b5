"""Small programs composed at random, compiled with patterns that select every key, against eager.

Masks, in-place writes, views, edits of scores, sinks, softcaps, caches, casts and keywords are put
together. `test_fuzzer_finds` puts old mistakes back in and asserts that they are found.
"""

from __future__ import annotations

import dataclasses

import pytest
import sympy
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch._dynamo.exc import BackendCompilerFailed

import mpass
from mpass.masks.prover import RULES
from mpass.masks.rules import indexing
from mpass.match import eager

N = 128
OPTIONS = {
    "pattern": mpass.VerticalSlash(1, 1 << 20),
    "dense_above": 2.0,
    "min_seq_len": 16,
    "inner_backend": "eager",
    "validate": "off",
}
BASES = ("tril", "arange", "where", "additive")
EDITS = (
    "columns_seen", "columns_hidden", "rows_seen", "slice_off_end", "padding", "window",
    "foreach_zero", "masked_fill_", "logical_not_twice", "unsqueeze_", "transpose_write",
    "keyword_where", "window_sinks", "compare_in_place", "copy_cast",
)  # fmt: skip
BEFORE = ("", "relu_inplace", "leaky_keyword", "cache_foreach", "cache_setitem", "scale_q")
SCORES = ("sdpa", "plain", "softcap", "sinks", "amax", "zeroed", "own_zeroed", "shifted", "half")
AFTER = ("", "view_write", "masked_rows", "add", "contiguous_view")


def drawn(edits=EDITS, before=BEFORE, scores=SCORES, after=AFTER):
    """Programs of these parts."""
    edit = st.tuples(st.sampled_from(edits), st.integers(0, 3))
    return st.tuples(
        st.sampled_from(BASES),
        st.lists(edit, max_size=3),
        st.sampled_from(before),
        st.sampled_from(scores),
        st.sampled_from(after),
    )


programs = drawn()


def tensors():
    generator = torch.Generator().manual_seed(1)
    query, key, value = (torch.randn(2, 2, N, 16, generator=generator) for _ in range(3))
    pad = torch.ones(2, N, dtype=torch.bool)
    pad[0, -9:] = False
    return query, key, value, pad, torch.randn(2, generator=generator), torch.zeros(2, 2, N, 16)


def mask_of(base, edits, pad):
    at = torch.arange(N)
    mask = {
        "tril": lambda: torch.ones(N, N, dtype=torch.bool).tril(),
        "arange": lambda: at[None] <= at[:, None],
        "where": lambda: torch.where(at[None] > at[:, None], 0, 1).bool(),
        "additive": lambda: torch.zeros(N, N).masked_fill(at[None] > at[:, None], -torch.inf) == 0,
    }[base]()
    for name, n in edits:
        size = (0, 1, 7, 40)[n]
        if name == "columns_seen":
            mask = mask.clone()
            mask[:, :size] = True
        elif name == "columns_hidden":
            mask = mask.clone()
            mask[..., 1 : 1 + size] = False
        elif name == "rows_seen":
            mask = mask.clone()
            mask[:size] = True
        elif name == "slice_off_end":
            mask = mask.clone()
            mask[:, N - size + 7 :] = False
        elif name == "padding" and mask.dim() == 2:
            mask = mask & pad[:, None, None]
        elif name == "window":
            mask = mask & (at[:, None] - at < 8 + size)
        elif name == "window_sinks":
            near = at[:, None] - at < 30
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
        elif name == "unsqueeze_" and mask.dim() == 2:
            mask = mask.clone()
            mask.unsqueeze_(0).unsqueeze_(0)
        elif name == "transpose_write":
            mask = mask.clone()
            mask.transpose(-1, -2)[..., 1 : 1 + size, :] = False
        elif name == "keyword_where":
            mask = torch.where(at < N - size, input=mask, other=torch.zeros_like(mask))
        elif name == "compare_in_place":
            number = mask.float()
            number.ge_(0.5)
            mask = number.bool()
        elif name == "copy_cast":
            mask = torch.empty_like(mask).copy_(mask.to(torch.bfloat16))
    return mask


def program(spec):
    base, edits, before, scores, after = spec

    def run(query, key, value, pad, sinks, cache):
        query = query * 1.0
        if before == "relu_inplace":
            F.hardswish(query, inplace=True)
        elif before == "leaky_keyword":
            F.leaky_relu(input=query, negative_slope=0.1, inplace=True)
        elif before == "cache_foreach":
            torch._foreach_copy_([cache], [key])
        elif before == "cache_setitem":
            cache[:, :, :N] = key
            key = cache
        elif before == "scale_q":
            query.mul_(0.5)
        mask = mask_of(base, edits, pad)
        if scores == "sdpa":
            out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask)
        else:
            s = query @ key.mT * 0.2
            if scores == "softcap":
                s = 5 * torch.tanh(s / 5)
            elif scores == "zeroed":
                s = s.masked_fill(torch.arange(N) % 3 == 0, 0.0)
            elif scores == "own_zeroed":
                s = s.masked_fill(torch.eye(N, dtype=torch.bool), 0.0)
            elif scores == "shifted":
                s = s + 1.0
            elif scores == "half":
                s = s.half().float()
            s = s.masked_fill(~mask, torch.finfo(s.dtype).min)
            if scores == "amax":
                s = s - s.amax(-1, keepdim=True)
            if scores == "sinks":
                column = sinks.view(1, -1, 1, 1).expand(2, 2, N, 1)
                out = torch.cat([s, column], -1).softmax(-1)[..., :-1] @ value
            else:
                out = torch.softmax(input=s, dim=-1) @ value
        if after == "view_write":
            out[:, :, 0].zero_()
        elif after == "masked_rows":
            out.transpose(1, 2).masked_fill_(~pad[:, :, None, None], 0.0)
        elif after == "add":
            out = out + 1
        elif after == "contiguous_view":
            out = out.transpose(1, 2).reshape(2, N, -1)
        # Rows whose keys are all hidden by a finite number are ours to choose: docs/soundness.md.
        seen = mask.expand(2, 2, N, N).any(-1)
        return out, cache, seen

    return run


def wrong(spec, **options) -> str:
    """What is wrong with a compiled program; "" if it does what eager does."""
    function = program(spec)
    mine, theirs = tensors(), tensors()
    torch._dynamo.reset()
    with torch.no_grad():
        expected, cache, seen = function(*theirs)
        try:
            compiled = torch.compile(function, backend="minference", options=OPTIONS | options)
            out, written, _ = compiled(*mine)
        except BackendCompilerFailed as error:
            return str(error).splitlines()[0]
    if out.shape != expected.shape or out.dtype != expected.dtype:
        return "another shape or dtype"
    if not torch.equal(cache, written):
        return "the cache differs"
    difference = (out - expected).abs()
    difference = difference[seen] if difference.dim() == 4 else difference[seen.all(1)]
    return "" if bool((difference < 1e-3).all()) else f"differs by {float(difference.max()):.3g}"


def examples(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@examples(24)
@given(programs)
def test_random_programs_are_not_wrong(spec):
    assert wrong(spec) == ""


@pytest.mark.slow
@examples(2000)
@given(programs)
def test_many_random_programs_are_not_wrong(spec):
    assert wrong(spec) == ""


@pytest.mark.slow
@examples(200)
@given(programs)
def test_every_proof_of_random_programs_holds(spec):
    assert wrong(spec, validate="full") == ""


def always(call):
    """A rule that lost a condition."""
    less_than(call)
    return sympy.true


less_than = RULES["lt"]


def old_bounds(item, size):
    """The bounds of an assigned slice as they were: an end of 0 was no bound."""
    begin, end = bounds(item, size)
    return begin, None if end == 0 else end


bounds = indexing.setitem_bounds


def without_softcap(chain):
    return dataclasses.replace(read_scores(chain), softcap=0.0)


read_scores = eager.read_scores

MASKS = drawn(("window", "window_sinks", "padding"), before=("",), after=("", "add"))

MISTAKES = {
    "assignment to an empty slice": (
        lambda m: m.setattr(indexing, "setitem_bounds", old_bounds),
        MASKS,
    ),
    "a lost window": (lambda m: m.setitem(RULES, "lt", always), MASKS),
    "a lost softcap": (lambda m: m.setattr(eager, "read_scores", without_softcap), programs),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_fuzzer_finds(name, monkeypatch):
    """With a mistake put back in, the programs that are drawn show a difference."""
    mistake, some = MISTAKES[name]
    mistake(monkeypatch)

    @settings(examples(60), phases=[Phase.generate], report_multiple_bugs=False)
    @given(some)
    def search(spec):
        assert wrong(spec) == ""

    with pytest.raises(AssertionError):
        search()
