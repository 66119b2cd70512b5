"""Random masks and spellings that almost look right: each is dense, or comes out equal.

Masks are random formulas over relations of positions, padding, heads and data; spellings are SDPA
or written out, with things that break the pattern (scores read twice, masks before the scale,
dropout, weights returned). What the matchers claim is computed again and compared.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.helpers.recording import record

B, H, N, D = 2, 2, 9, 4


def tensors() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    query, key, value = (torch.randn(B, H, N, D, generator=generator) for _ in range(3))
    pad = torch.ones(B, N, dtype=torch.int64)
    pad[0, :2] = 0
    pad[1, -3:] = 0
    return query, key, value, pad


ATOMS = ("causal", "window", "from", "until", "pad_key", "pad_query", "head", "row", "data", "all")


@st.composite
def formulas(draw, depth=2):
    """A nested tuple: an atom with a number, or an operator with formulas."""
    if depth == 0 or draw(st.booleans()):
        return draw(st.sampled_from(ATOMS)), draw(st.integers(-2, 3))
    operator = draw(st.sampled_from(("and", "and", "and", "or", "not")))
    if operator == "not":
        return operator, draw(formulas(depth - 1))
    return operator, draw(formulas(depth - 1)), draw(formulas(depth - 1))


def cells(formula, query, pad):
    """A formula as a bool mask that broadcasts to [B, H, N, N], in traceable torch."""
    name, *rest = formula
    if name == "and":
        return cells(rest[0], query, pad) & cells(rest[1], query, pad)
    if name == "or":
        return cells(rest[0], query, pad) | cells(rest[1], query, pad)
    if name == "not":
        return ~cells(rest[0], query, pad)
    shift = rest[0]
    n = query.shape[2]
    k = torch.arange(n)[None, None, None, :]
    q = torch.arange(n)[None, None, :, None]
    everything = torch.ones(1, 1, n, n, dtype=torch.bool)
    return {
        "causal": lambda: k <= q + shift,
        "window": lambda: q - k < 4 + shift,
        "from": lambda: (k >= shift) & everything,
        "until": lambda: (k < n - 2 + shift) & everything,
        "pad_key": lambda: (pad[:, None, None, :] > 0) & everything,
        "pad_query": lambda: (pad[:, None, :, None] > 0) & everything,
        "head": lambda: k <= q + torch.arange(H)[None, :, None, None],
        "row": lambda: k <= q + pad.sum(-1)[:, None, None, None] - 7,
        "data": lambda: (query[:, :1, :1, :1] > shift / 3) & everything,
        "all": lambda: everything,
    }[name]()


WRITTEN = ("fill", "where", "add", "add_small", "fill_inplace")
BREAKS = (
    "",
    "scale_after",
    "weights_returned",
    "scores_returned",
    "dropout",
    "mask_of_scores",
    "double",
    "value_written",
    "weights_masked",
    "softmax_over_queries",
    "bias",
)


def written_out(query, key, value, mask, how, broken, softcap):
    """Attention by hand; `broken` names what is wrong with it."""
    scores = query @ key.transpose(-1, -2)
    if broken != "scale_after":
        scores = scores * 0.5
    if softcap:
        scores = 3.0 * torch.tanh(scores / 3.0)
    if broken == "bias":
        scores = scores + query.sum(-1, keepdim=True).transpose(-1, -2)
    if broken == "mask_of_scores":
        mask = mask & (scores > -1)
    minimum = torch.finfo(scores.dtype).min
    if how == "fill":
        masked = scores.masked_fill(~mask, float("-inf"))
    elif how == "fill_inplace":
        masked = scores + 0.0 * 1
        masked.masked_fill_(~mask, minimum)
    elif how == "where":
        masked = torch.where(mask, scores, minimum)
    else:
        masked = scores + torch.where(mask, 0.0, -3.0 if how == "add_small" else minimum)
    if broken == "scale_after":
        masked = masked * 0.5
    if broken == "double":
        masked = masked + masked
    weights = torch.softmax(masked, dim=-2 if broken == "softmax_over_queries" else -1)
    returned = weights if broken == "weights_returned" else scores * 1
    if broken == "dropout":
        weights = F.dropout(weights, 0.2, training=True)
    if broken == "weights_masked":
        weights = weights.masked_fill(weights < 0.05, 0.0)
    if broken == "value_written":
        value = value.clone()
        query = value.mul_(2)
    out = weights @ value
    return (out, returned) if broken in ("weights_returned", "scores_returned") else out


@settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
@given(formulas(), st.sampled_from(("bool", "additive", "infinite")), st.booleans())
def test_random_masks_of_sdpa_are_dense_or_equal(formula, kind, causal_flag):
    def attention(query, key, value, pad):
        if causal_flag and formula[0] == "all":
            return F.scaled_dot_product_attention(query, key, value, None, 0.0, True)
        mask = cells(formula, query, pad)
        if kind != "bool":
            hidden = -math.inf if kind == "infinite" else torch.finfo(query.dtype).min
            mask = torch.zeros(mask.shape).masked_fill(~mask, hidden)
        return F.scaled_dot_product_attention(query, key, value, mask)

    (found,), _ = record(attention, *tensors())
    if found.proven:
        assert found.wrong_cells() == 0
        assert found.error() < 1e-5
    else:
        assert found.site.dense_reason or found.site.unproven


@settings(max_examples=60, suppress_health_check=list(HealthCheck), derandomize=True)
@given(
    st.one_of(st.just(("causal", 0)), formulas(1)),
    st.sampled_from(WRITTEN),
    st.sampled_from(BREAKS),
    st.booleans(),
)
def test_random_spellings_written_out_are_dense_or_equal(formula, how, broken, softcap):
    def attention(query, key, value, pad):
        mask = cells(formula, query, pad)
        return written_out(query, key, value, mask, how, broken, softcap)

    found, _ = record(attention, *tensors())
    for each in found:
        if each.proven:
            assert each.error() < 1e-5
            query, _, _, pad = tensors()
            expected = cells(formula, query, pad)
            if how != "add_small":  # a number per key that hides nothing is a bias
                assert torch.equal(each.visible.expand(B, H, N, N), expected.expand(B, H, N, N))
            assert broken not in ("weights_returned", "dropout", "mask_of_scores")
            assert broken != "bias" or each.site.key_bias is not None
        else:
            assert each.site.dense_reason or each.site.unproven
