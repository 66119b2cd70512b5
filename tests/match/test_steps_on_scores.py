"""Steps between the products that are served as masks and sinks, and others, which are seen."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from mpass.evaluate.coverage import FULL_BUDGET
from mpass.match import find_attention
from mpass.report import reports

B, H, N, D = 2, 4, 80, 16
LOWEST = torch.finfo(torch.float32).min


def causal(n: int, hidden: float = LOWEST) -> torch.Tensor:
    return torch.full((n, n), hidden).triu(1)


def padded(x: torch.Tensor) -> torch.Tensor:
    """[B, 1, 1, Nk] with the last keys of the second row hidden."""
    hidden = torch.arange(x.shape[2]) >= torch.tensor([[N], [50]])
    return torch.zeros(hidden.shape).masked_fill(hidden, LOWEST)[:, None, None]


class WithBuffers(nn.Module):
    """Masks that are buffers, whose values are unknown while compiling."""

    def __init__(self) -> None:
        super().__init__()
        band = torch.ones(N, N).tril().triu(-9).bool()
        self.register_buffer("band", band[None, None])
        self.register_buffer("slope", torch.zeros(N, N) - 1)


def not_below_the_lowest(x):
    """XGLM: two masks add up to minus infinity, which is then the lowest number."""
    scores = (x @ x.mT / 4).flatten(0, 1).view(B, H, N, N) + causal(N) + padded(x)
    scores = torch.max(scores, torch.tensor(LOWEST)).view(B * H, N, N)
    return torch.bmm(F.softmax(scores, -1), x.flatten(0, 1)).view(B, H, N, D)


def clamped(x):
    scores = torch.clamp(x @ x.mT / 4 + causal(N, -torch.inf), min=LOWEST)
    return F.softmax(scores, -1) @ x


def masked_before_the_scale(x):
    """CodeGen"""
    return F.softmax((x @ x.mT + causal(N)) / 4, -1) @ x


def masked_between_factors_under_a_softcap(x):
    scores = 30 * torch.tanh(x @ x.mT / 30)
    return F.softmax((scores * 0.5 + causal(N)) * 0.7, -1) @ x


class BufferAndMask(WithBuffers):
    """GPT-Neo"""

    def forward(self, x):
        lowest = torch.tensor(LOWEST, dtype=x.dtype)
        scores = torch.where(self.band[:, :, :N, :N], x @ x.mT, lowest) + padded(x)
        return F.softmax(scores, -1) @ x


class TwoBuffers(WithBuffers):
    def forward(self, x):
        scores = (x @ x.mT).masked_fill(~self.band, -1e38)
        return F.softmax(scores.masked_fill(self.slope > 0, -torch.inf), -1) @ x


class GatedBySinks(nn.Module):
    """Granite's sliding windows: sinks are put on the output."""

    def __init__(self) -> None:
        super().__init__()
        self.sinks = nn.Parameter(torch.tensor([0.5, -1.0, 2.0, 0.0]), requires_grad=False)

    def forward(self, x):
        scores = x @ x.mT / 4 + causal(N)
        gate = (torch.logsumexp(scores, dim=-1) - self.sinks.view(1, -1, 1)).float().sigmoid()
        return F.softmax(scores, -1) @ x * gate.unsqueeze(-1)


def masked_in_the_shape_of_the_scores(x):
    """XLM: the scores give a mask their shape, and the weights their dtype."""
    scores = x @ x.mT / 4
    hidden = (causal(N) != 0).expand_as(scores)
    scores.masked_fill_(hidden, LOWEST)
    return F.softmax(scores.float(), -1).type_as(scores) @ x


SERVED = (
    masked_in_the_shape_of_the_scores,
    not_below_the_lowest,
    clamped,
    masked_before_the_scale,
    masked_between_factors_under_a_softcap,
    BufferAndMask(),
    TwoBuffers(),
    GatedBySinks(),
)


def compiled(program, x, options=FULL_BUDGET):
    torch._dynamo.reset()
    with torch.no_grad():
        found = torch.compile(program, backend="minference", options=options)(x)
    return found, reports()[-1].sites


def name_of(program):
    return getattr(program, "__name__", type(program).__name__)


def inputs() -> torch.Tensor:
    return torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("program", SERVED, ids=name_of)
def test_steps_that_mask_scores_are_exact(program):
    x = inputs()
    found, sites = compiled(program, x, FULL_BUDGET | {"inner_backend": "eager"})
    assert [site.status for site in sites] == ["sparse"], sites
    expected = program(x)
    seen = slice(None) if program is not not_below_the_lowest else slice(0, 50)  # else: padding
    assert torch.allclose(found[:, :, seen], expected[:, :, seen], atol=1e-5)


def cut_off(x):
    """Scores below zero become zero, which hides nothing."""
    return F.softmax(torch.clamp(x @ x.mT / 4 + causal(N), min=0.0), -1) @ x


def turned_round(x):
    return F.softmax((x @ x.mT - causal(N)) * -0.25, -1) @ x


def hidden_too_little(x):
    """What hides is divided until it does not."""
    return F.softmax((x @ x.mT + causal(N, -1e5)) / 1e4, -1) @ x


def squared(x):
    return F.softmax((x @ x.mT).pow(2) + causal(N), -1) @ x


def talking_heads(x):
    mixed = torch.einsum("hg,bgqk->bhqk", torch.eye(H), x @ x.mT / 4) + causal(N)
    return torch.einsum("hg,bgqk->bhqk", torch.eye(H), F.softmax(mixed, -1)) @ x


def smoothed(x):
    weights = F.conv2d(F.softmax(x @ x.mT / 4 + causal(N), -1), torch.ones(H, 1, 1, 1), groups=H)
    return weights @ x


class GatedTwice(GatedBySinks):
    """The gate is returned as well, so that the scores must exist."""

    def forward(self, x):
        scores = x @ x.mT / 4 + causal(N)
        gate = (torch.logsumexp(scores, -1) - self.sinks.view(1, -1, 1)).sigmoid()
        return (F.softmax(scores, -1) @ x * gate[..., None]) + gate[..., None]


class GatedWithoutSinks(GatedBySinks):
    """Each row has another number."""

    def forward(self, x):
        scores = x @ x.mT / 4 + causal(N)
        gate = (torch.logsumexp(scores, -1) - x[..., 0]).sigmoid()
        return F.softmax(scores, -1) @ x * gate.unsqueeze(-1)


def shape_of_the_scores_given_away(x):
    scores = x @ x.mT / 4 + causal(N)
    return F.softmax(scores, -1) @ x + x[:, :, :, :1].expand_as(scores)[..., :D]


DENSE = {
    shape_of_the_scores_given_away: "also read by expand_as",
    cut_off: "scores are changed by clamp",
    turned_round: "after a mask or a bias",
    hidden_too_little: "additive bias",
    squared: "scores are changed by pow",
    talking_heads: "scores are changed by einsum",
    smoothed: "weights are changed by conv2d",
    GatedTwice(): "also read by",
    GatedWithoutSinks(): "sinks are not one number per head",
}


@pytest.mark.parametrize("program", DENSE, ids=name_of)
def test_other_steps_are_seen_and_stay_dense(program):
    x = inputs()
    found, sites = compiled(program, x, FULL_BUDGET | {"inner_backend": "eager"})
    assert [site.status for site in sites] == ["dense"], sites
    assert DENSE[program] in sites[0].reason
    assert torch.equal(found, program(x))


@pytest.mark.parametrize("keeps_last", [False, True], ids=["[B, H, Nq]", "[B, H, Nq, 1]"])
def test_a_number_per_query_is_no_sink_where_there_are_as_many_heads(keeps_last):
    """Of fewer dimensions than the log-sum-exps, a tensor's second one may be the queries."""
    heads = N
    sinks = torch.randn(heads, generator=torch.Generator().manual_seed(1))

    def program(x):
        given = sinks.view(1, -1, 1) if keeps_last else sinks.view(1, -1)
        scores = x @ x.mT / 4 + causal(N)
        gate = (torch.logsumexp(scores, -1, keepdim=keeps_last) - given).sigmoid()
        return F.softmax(scores, -1) @ x * (gate if keeps_last else gate.unsqueeze(-1))

    x = torch.randn(1, heads, N, D, generator=torch.Generator().manual_seed(2))
    options = FULL_BUDGET | {"inner_backend": "eager", "validate": "off"}
    found, sites = compiled(program, x, options)
    assert [site.status for site in sites] == ["dense"], sites
    assert torch.equal(found, program(x))


def test_layers_between_products_are_no_attention():
    """A router's softmax of what attention gave, whose widths are alike by chance."""

    def router(x, weight):
        hidden = F.linear(x @ x.mT @ x, weight)
        return F.softmax(F.linear(hidden, weight), -1) @ x[:, :, :D]

    graphs = []
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(router, backend=lambda gm, _: graphs.append(gm) or gm.forward)(
            torch.randn(1, 2, D, D), torch.randn(D, D)
        )
    assert find_attention(graphs[0]) == []
