"""What a reason names is meant: nothing is called a bias, decoding or a difference that is none."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.evaluate.coverage import FULL_BUDGET
from mpass.story.remedies import remedy_of

N, D = 160, 16
ROWS = torch.arange(N)
CAUSAL = ROWS[:, None] >= ROWS


def names(value):
    return getattr(value, "__name__", type(value).__name__) if callable(value) else None


def dense_site(program, *more):
    """The one site of a program, whose result has to be eager's."""
    torch._dynamo.reset()
    inputs = torch.randn(3, 1, 4, N, D, generator=torch.Generator().manual_seed(0)).unbind(0)
    options = FULL_BUDGET | {"inner_backend": "eager", "read_masks": False}
    with torch.no_grad():
        expected = program(*inputs, *more)
        found = torch.compile(program, backend="minference", options=options)(*inputs, *more)
    assert torch.equal(found, expected)
    (site,) = mpass.reports()[-1].sites
    return site


class Pooling(nn.Module):
    """A learned token that attends to all others."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 4, 1, D))

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(self.token, k, v)


class Windows(nn.Module):
    """Swin's bias from a table, by an index that is a buffer."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * N, 4))
        self.register_buffer("index", (ROWS[:, None] - ROWS + N).flatten())

    def forward(self, q, k, v):
        bias = self.table[self.index].view(N, N, 4).permute(2, 0, 1)
        return ((q @ k.mT) + bias[None]).softmax(-1) @ v


class Buckets(nn.Module):
    """T5's bias, by buckets of distances."""

    def __init__(self):
        super().__init__()
        self.table = nn.Embedding(8, 4)

    def forward(self, q, k, v):
        away = (ROWS[:, None] - ROWS).abs().clamp(max=7)
        return ((q @ k.mT) + self.table(away).permute(2, 0, 1)).softmax(-1) @ v


class FromLayers(torch.nn.Module):
    """A bias that layers compute, as those of ProphetNet and Inkling do: none of their weights."""

    def __init__(self):
        super().__init__()
        self.words = torch.nn.Embedding(N, 8)
        self.relative = torch.nn.Linear(8, N)

    def forward(self, q, k, v):
        return ((q @ k.mT) + self.relative(self.words(ROWS))).softmax(-1) @ v


def per_head_input(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.expand(1, 4, N, N))


def added_input(q, k, v, mask):
    mask = torch.where(mask, 0.0, -torch.inf).sum(1, keepdim=True)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def two_inputs(q, k, v, mask):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask + mask.mT)


def one_head_last(q, k, v):
    """[B, N, 1, D]: the third size is no number of queries."""
    q, k, v = (x[:, :1].transpose(1, 2) for x in (q, k, v))
    scores = torch.einsum("bihd,bjhd->bhij", q, k)
    return torch.einsum("bhij,bjhd->bihd", scores.relu().softmax(-1), v)


def other_factor(q, k, v):
    return torch.add(q @ k.mT, torch.where(CAUSAL, 0.0, -torch.inf), alpha=2).softmax(-1) @ v


def bias_and_cap(q, k, v):
    scores = ((q @ k.mT) + ROWS[:, None] * 0.1).tanh()
    return scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ v


def two_scores(q, k, v):
    scores = torch.cat([q @ k.mT, q @ k[..., :8, :].mT], -1).softmax(-1)
    return scores[..., :-8] @ v


MASK = torch.rand(1, 4, N, N, generator=torch.Generator().manual_seed(0)) > 0.5

CASES = (
    (Pooling(), (), "one query: there is nothing to skip", ("decoding", "causal")),
    (Windows(), (), "a learned bias is added, which is no mask: self.table", ("negative",)),
    (
        Buckets(),
        (),
        "a learned bias is added, which is no mask: self.table.weight",
        ("understood",),
    ),
    (FromLayers(), (), "is not known to be a mask", ("learned", "words")),
    (per_head_input, (MASK,), "may differ per head: mask is an input", ("differs",)),
    (added_input, (MASK,), "is not known to be a mask", ("bias",)),
    (
        two_inputs,
        (torch.where(MASK[:, :1], 0.0, -1e4),),
        "is not known to be a mask",
        ("bias is added", "no mask"),
    ),
    (one_head_last, (), "changed by relu before the softmax", ("one query",)),
    (other_factor, (), "alpha of add is not understood on scores", ("scaled",)),
    (bias_and_cap, (), "changed by tanh after a mask or a bias", ()),
    (two_scores, (), "scores are joined with others", ("sink are", "not cut off")),
)


def row_by_row(q, k, v):
    """litgpt's window: one write per row."""
    mask = torch.full((N, N), float("-inf"))
    for row in range(N):
        mask[row, max(0, row - 39) : row + 1] = 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def talking_heads(q, k, v):
    """x-transformers: mixed heads are added to the scores."""
    scores = q @ k.mT
    scores = scores + F.conv2d(scores, torch.ones(4, 4, 1, 1))
    return scores.masked_fill(~CAUSAL, -torch.inf).softmax(-1) @ v


class Alibi(nn.Module):
    """x-transformers keeps the bias of all distances as a buffer."""

    def __init__(self):
        super().__init__()
        self.register_buffer("bias", -(ROWS[:, None] - ROWS).abs() * torch.ones(4, 1, 1))

    def forward(self, q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=self.bias)


REMEDIES = (
    (row_by_row, "by comparing positions"),
    (talking_heads, "scores that are changed by scores are not served"),
    (Alibi(), "make it of the positions' difference inside the compiled model"),
    (Windows(), "make it of the difference of positions, k - q"),
    (Pooling(), "nothing needs to be done"),
)


@pytest.mark.parametrize("program, words", REMEDIES, ids=names)
def test_a_reason_has_the_remedy_that_it_needs(program, words):
    site = dense_site(program)
    assert words in remedy_of(site.reason), site.reason


@pytest.mark.parametrize("program, more, words, absent", CASES, ids=names)
def test_a_reason_names_what_is_meant(program, more, words, absent):
    site = dense_site(program, *more)
    assert words in site.reason
    assert not any(word in site.reason for word in absent), site.reason
    assert remedy_of(site.reason)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_no_key_is_hidden_without_a_mask_whatever_the_scale_is(scale):
    """A reason spoke of hidden keys; without a mask there are none, and attention is served."""

    def program(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, scale=scale)

    torch._dynamo.reset()
    inputs = torch.randn(3, 1, 4, N, D, generator=torch.Generator().manual_seed(0)).unbind(0)
    options = FULL_BUDGET | {"inner_backend": "eager"}
    with torch.no_grad():
        found = torch.compile(program, backend="minference", options=options)(*inputs)
    assert torch.allclose(found, program(*inputs), atol=1e-5)
    assert [site.status for site in mpass.reports()[-1].sites] == ["sparse"]


def test_a_pooling_model_is_not_said_to_decode():
    torch._dynamo.reset()
    mpass.report._reports.clear()
    inputs = torch.randn(3, 1, 4, N, D).unbind(0)
    with torch.no_grad():
        torch.compile(Pooling(), backend="minference", options={"inner_backend": "eager"})(*inputs)
    assert not any("only decoding" in note for note in mpass.last_report().notes)
