"""What looks like attention and is not served is listed with what it is; nothing else is."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import mpass
from mpass.evaluate.coverage import FULL_BUDGET

N, D = 160, 16
CAUSAL = torch.ones(N, N, dtype=torch.bool).tril()


def sigmoid_scores(q, k, v):
    scores = (q @ k.mT * 0.25 - 3).masked_fill(~CAUSAL, -torch.inf)
    return scores.sigmoid() @ v


def relu_scores(q, k, v):
    return F.relu(q @ k.mT) / N @ v


def squared_relu_scores(q, k, v):
    """FLASH, Primer and x-transformers' attn_sparse relu2."""
    return (F.relu(torch.einsum("bhid,bhjd->bhij", q, k) / N) ** 2 * CAUSAL) @ v


def written_out_softmax(q, k, v):
    weights = (q @ k.mT * 0.25).exp() * CAUSAL
    return weights / weights.sum(-1, keepdim=True) @ v


def linear_attention_with_cells(q, k, v):
    """The kernel of linear attention, elu + 1, with every cell, as its causal form is taught."""
    cells = (F.elu(q) + 1) @ (F.elu(k) + 1).mT * CAUSAL
    return cells @ v


def heads_mixed_by_a_layer(q, k, v):
    """Talking heads by a linear layer over the last dimension, as in CaiT."""
    mix = torch.eye(4) + 0.1
    scores = F.linear((q @ k.mT * 0.25).permute(0, 2, 3, 1), mix).permute(0, 3, 1, 2)
    return scores.softmax(-1) @ v


def heads_mixed_by_a_convolution(q, k, v):
    mix = (torch.eye(4) + 0.1)[:, :, None, None]
    return F.conv2d(F.conv2d(q @ k.mT * 0.25, mix).softmax(-1), mix) @ v


def heads_mixed_by_einsum(q, k, v):
    mix = torch.eye(4) + 0.1
    weights = torch.einsum("hg,bhij->bgij", mix, q @ k.mT * 0.25).softmax(-1)
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("hg,bhij->bgij", mix, weights), v)


def over_queries(q, k, v):
    """Slot attention: the slots compete for each input."""
    return (q @ k.mT * 0.25).softmax(-2) @ v


def of_five_dimensions(q, k, v):
    q, k, v = (x.unflatten(1, (2, 2)) for x in (q, k, v))
    scores = torch.einsum("bghid,bghjd->bghij", q, k)
    return torch.einsum("bghij,bghjd->bghid", scores.softmax(-1), v).flatten(1, 2)


def with_dots(q, k, v):
    scores = torch.einsum("...id,...jd->...ij", q, k)
    return torch.einsum("...ij,...jd->...id", scores.sigmoid(), v)


def turned_round(q, k, v):
    """Scores [.., Nk, Nq], as column attention has them."""
    return (k @ q.mT).sigmoid().transpose(-1, -2) @ v


def with_a_memory(q, k, v):
    """Scores of two parts that have one softmax."""
    memory = torch.stack([k[..., :8, :], v[..., :8, :]])
    scores = torch.cat([q @ memory[0].mT, q @ k.mT], -1).softmax(-1)
    return scores[..., :8] @ memory[1] + scores[..., 8:] @ v


def doubled_rows(q, k, v):
    return (q @ k.mT).sigmoid().view(4, N, N).contiguous() @ v.reshape(4, N, D)


LISTED = {
    sigmoid_scores: "without a softmax over its keys: its weights are made by sigmoid,",
    relu_scores: "its weights are made by relu,",
    squared_relu_scores: "its weights are made by relu, pow,",
    written_out_softmax: "its weights are made by exp,",
    linear_attention_with_cells: "its weights are made by scaling and masking the scores,",
    heads_mixed_by_a_layer: "between its two products are linear, softmax",
    heads_mixed_by_a_convolution: "scores are changed by conv2d before the softmax",
    heads_mixed_by_einsum: "scores are changed by einsum before the softmax",
    over_queries: "the softmax is over another dimension than the keys",
    of_five_dimensions: "scores have 5 dimensions",
    with_dots: "its weights are made by sigmoid,",
    turned_round: "its weights are made by sigmoid,",
    with_a_memory: "scores are joined with others by cat",
    doubled_rows: "its weights are made by sigmoid,",
}


def compiled(program, *inputs, dynamic=False):
    torch._dynamo.reset()
    options = FULL_BUDGET | {"inner_backend": "eager"}
    with torch.no_grad():
        expected = program(*inputs)
        found = torch.compile(program, backend="minference", options=options, dynamic=dynamic)
        assert torch.equal(found(*inputs), expected)
    return mpass.reports()[-1].sites


def tensors(dim=D):
    return torch.randn(3, 1, 4, N, dim, generator=torch.Generator().manual_seed(0)).unbind(0)


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("program", LISTED, ids=lambda program: program.__name__)
def test_what_looks_like_attention_is_listed(program, dynamic):
    if dynamic and program is doubled_rows:
        pytest.skip("the program has the sizes in it")
    sites = compiled(program, *tensors(), dynamic=dynamic)
    assert {site.status for site in sites} == {"dense"}
    assert all(LISTED[program] in site.reason for site in sites), sites
    assert len(sites) == 1
    assert sites[0].source.startswith(__file__)


class Experts(nn.Module):
    """Layers of experts by bmm: their weights are parameters."""

    def __init__(self):
        super().__init__()
        self.up, self.down = (nn.Parameter(torch.randn(4, *s)) for s in ((D, 512), (512, D)))

    def forward(self, q, k, v):
        return torch.bmm(F.relu(torch.bmm(q[0], self.up)) ** 2, self.down)


def state_of_linear_attention(q, k, v):
    """A cell per pair of channels, whichever factor comes first."""
    state = k.mT @ v
    return torch.einsum("bhde,bhnd->bhne", state, q) + q @ state


def expert_after_a_break(q, k, v):
    """The weights of an expert, which a graph break makes inputs: DBRX."""
    hidden = F.layer_norm(q, (D,)) @ k.mT
    return F.silu(hidden) @ v


def in_chunks(q, k, v):
    """The chunks of a recurrence: 32 keys at a time."""
    parts = [x.unflatten(2, (-1, 32)) for x in (q, k, v)]
    cells = parts[0] @ parts[1].mT * torch.ones(32, 32).tril()
    return (cells @ parts[2]).flatten(2, 3)


def gram(q, k, v):
    return q @ k.mT


class OneHead(nn.Module):
    """An attention whose output is projected and attends again: the first is not behind the second.

    Its sizes are all the same, so that only the axes tell.
    """

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, q, k, v):
        for layer in (self.first, self.second):
            scores = (layer(q) @ k.mT).masked_fill(~CAUSAL, -torch.inf)
            q = q + scores.softmax(-1) @ v
        return q


@pytest.mark.parametrize(
    "program", [Experts(), expert_after_a_break, state_of_linear_attention, in_chunks, gram]
)
def test_what_is_no_attention_is_not_listed(program):
    assert compiled(program, *tensors()) == ()


def test_layers_of_equal_sizes_are_told_apart():
    inputs = tensors(N)
    torch._dynamo.reset()
    options = FULL_BUDGET | {"inner_backend": "eager"}
    with torch.no_grad():
        torch.compile(OneHead(), backend="minference", options=options)(*inputs)
    assert len(mpass.reports()[-1].sites) == 2


def test_a_loop_is_listed_once():
    def blocks(q, k, v):
        return sum((q @ k.mT + i).sigmoid() @ v for i in range(3))

    (site,) = compiled(blocks, *tensors())
    assert "sigmoid" in site.reason


def test_served_attention_beside_it_is_served():
    def both(q, k, v):
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return out, (out @ (k + 1).mT).sigmoid() @ (v + 1)

    torch._dynamo.reset()
    options = FULL_BUDGET | {"inner_backend": "eager"}
    with torch.no_grad():
        found = torch.compile(both, backend="minference", options=options)(*tensors())
        for one, other in zip(found, both(*tensors()), strict=True):
            assert torch.allclose(one, other, atol=1e-5)
    assert [site.status for site in mpass.reports()[-1].sites] == ["sparse", "dense"]
