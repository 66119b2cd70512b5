"""Spellings of attention: each is found, bound to the right tensors, and computes the same."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention

from mpass.match import find_attention
from tests.helpers.recording import record

B, H, N, D = 2, 4, 24, 16


@pytest.fixture
def x() -> torch.Tensor:
    return torch.randn(B, H, N, D, generator=torch.Generator().manual_seed(0))


def seen(n: int) -> torch.Tensor:
    return torch.tril(torch.ones(n, n, dtype=torch.bool))


def by_position(x):
    return F.scaled_dot_product_attention(x, x, x, None, 0.0, True)


def by_keyword(x):
    return F.scaled_dot_product_attention(query=x, key=x, value=x, is_causal=True, scale=0.3)


def grouped(x):
    return F.scaled_dot_product_attention(x, x[:, :2], x[:, 2:], is_causal=True, enable_gqa=True)


def masked_fill(x):
    scores = (x @ x.transpose(-1, -2) / 4).masked_fill(~seen(N), float("-inf"))
    return F.softmax(scores, -1) @ x


def scale_in_place(x):
    scores = x @ x.mT
    scores *= 0.25
    scores += torch.triu(torch.full((N, N), float("-inf")), 1)
    return torch.softmax(scores, -1) @ x


def written_in_place(x):
    scores = x @ x.transpose(-1, -2)
    scores.mul_(0.25)
    scores.masked_fill_(~seen(N), float("-inf"))
    return torch.softmax(scores, -1) @ x


def softcap(x):
    scores = 30 * torch.tanh(x @ x.transpose(2, 3) * 0.25 / 30)
    weights = F.softmax(scores.masked_fill(~seen(N), -1e9), dim=-1, dtype=torch.float32)
    return F.dropout(weights.to(x.dtype), p=0.1, training=False) @ x


def einsum(x):
    scores = torch.where(seen(N), torch.einsum("bhqd,bhkd->bhqk", x, x) * 0.25, -1e9)
    return torch.einsum("bhqk,bhkd->bqhd", scores.softmax(-1), x)


def einsum_by_position(x):
    y = x.transpose(1, 2).contiguous() * 1.5
    scores = torch.einsum("bqhd,bkhd->bhqk", y, y).masked_fill(~seen(N), -1e9)
    return torch.einsum("bhqk,bkhd->bqhd", scores.softmax(-1), y)


def repeat_interleave(x):
    key = (x[:, :2] * 2).repeat_interleave(2, dim=1)
    scores = (x @ key.mT * 0.25).masked_fill(~seen(N), -1e9)
    return F.softmax(scores, -1) @ key


def expand_and_reshape(x):
    small = x[:, :2] * 2
    key = small[:, :, None].expand(B, 2, 2, N, D).reshape(B, H, N, D)
    return F.scaled_dot_product_attention(x, key, key, seen(N))


def maximum_subtracted(x):
    scores = (x @ x.mT).masked_fill(~seen(N), -1e9)
    scores = scores - scores.max(dim=-1, keepdim=True).values
    return scores.softmax(-1) @ x


def sinks(x):
    logits = torch.linspace(-1, 1, H)
    scores = (x @ x.mT * 0.25).masked_fill(~seen(N), -1e9)
    joined = torch.cat([scores, logits.reshape(1, -1, 1, 1).expand(B, -1, N, -1)], dim=-1)
    return joined.softmax(-1)[..., :-1] @ x


def copied_for_statistics(x):
    scores = x @ x.mT * 0.25
    kept = scores.clone()
    kept = kept.detach() * 2  # x-transformers keeps such copies, which nothing reads
    weights = scores.masked_fill(~seen(N), -1e9).softmax(-1)
    weights.clone()
    return weights @ x


SPELLINGS = [
    copied_for_statistics,
    by_position,
    by_keyword,
    grouped,
    masked_fill,
    scale_in_place,
    written_in_place,
    softcap,
    einsum,
    einsum_by_position,
    repeat_interleave,
    expand_and_reshape,
    maximum_subtracted,
]


@pytest.mark.parametrize("attention", SPELLINGS, ids=lambda function: function.__name__)
def test_spelling_is_found_and_computes_the_same(attention, x):
    (found,), _ = record(attention, x)
    assert not found.site.dense_reason
    assert found.site.mask is not None and found.site.mask.causal, found.site.unproven
    assert found.error() < 1e-5


def test_softcap_and_scale_are_told_apart(x):
    (found,), _ = record(softcap, x)
    assert found.site.softcap == pytest.approx(30)
    assert found.site.scale == pytest.approx(0.25)


@pytest.mark.parametrize("attention", [repeat_interleave, expand_and_reshape])
def test_repeated_kv_heads_are_recovered(attention, x):
    (found,), _ = record(attention, x)
    assert (found.site.num_heads, found.site.num_kv_heads) == (4, 2)


def test_sinks_are_found_when_they_are_an_input(x):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.sinks = nn.Parameter(torch.linspace(-1, 1, H))

        def forward(self, x):
            scores = (x @ x.mT * 0.25).masked_fill(~seen(N), -1e9)
            column = self.sinks.reshape(1, -1, 1, 1).expand(B, -1, N, -1)
            joined = torch.cat([scores, column], dim=-1)
            joined = joined - joined.max(dim=-1, keepdim=True).values
            return joined.softmax(-1)[..., :-1] @ x

    (found,), _ = record(Model(), x)
    assert found.site.sinks is not None, found.site.dense_reason
    assert found.error() < 1e-5


def returned(x):
    weights = masked_softmax(x)
    return weights @ x, weights


def masked_softmax(x):
    return (x @ x.mT).masked_fill(~seen(N), -1e9).softmax(-1)


def dropped(x):
    return F.dropout(masked_softmax(x), 0.1, training=True) @ x


def masked_by_scores(x):
    scores = x @ x.mT
    return scores.masked_fill(scores < 0.1, -1e9).softmax(-1) @ x


def value_written(x):
    value = x.clone()
    weights = masked_softmax(value)
    value.mul_(2)
    return weights @ value


def broadcast_product(x):
    scores = (x @ x[0].mT).masked_fill(~seen(N), -1e9)
    return scores.softmax(-1) @ x[0]


def alibi(x):
    y = x.reshape(B * H, N, D)
    slopes = (torch.arange(N * N) % 7.0).expand(B * H, N * N).view(B * H, N, N)
    scores = slopes.baddbmm(batch1=y, batch2=y.transpose(1, 2), beta=1.0, alpha=0.25)
    weights = (scores.view(B, H, N, N) + torch.triu(torch.full((N, N), -1e9), 1)).softmax(-1)
    return torch.bmm(weights.view(B * H, N, N), y)


def sdpa_dropout(x):
    return F.scaled_dot_product_attention(x, x, x, dropout_p=0.1, is_causal=True)


DENSE = {
    returned: "returned",
    dropped: "dropout p=0.1",
    masked_by_scores: "also read by",
    value_written: "written in place",
    broadcast_product: "[B, H, N, D]",
    alibi: "baddbmm adds to the scores what is not known to be",
    sdpa_dropout: "model.eval()",
}


@pytest.mark.parametrize("attention", DENSE, ids=lambda function: function.__name__)
def test_what_is_not_plain_attention_stays_dense_with_a_reason(attention, x):
    (found,), _ = record(attention, x)
    assert DENSE[attention] in found.site.dense_reason


def test_softmax_of_a_router_is_no_attention(x):
    def router(x):
        scores = F.linear(x[:, 0], torch.ones(8, D)).softmax(-1)
        weights, chosen = scores.topk(2)
        return weights, chosen

    found, _ = record(router, x)
    assert found == []


def test_gradients_keep_a_site_dense(x):
    sites = []

    def backend(gm, _inputs):
        sites.extend(find_attention(gm))
        return gm

    torch._dynamo.reset()
    torch.compile(by_position, backend=backend)(x.requires_grad_())
    assert "no_grad" in sites[0].dense_reason


# -- flex_attention ---------------------------------------------------------------------------

LONG = 256
PAD = torch.ones(B, LONG, dtype=torch.bool)
PAD[1, :7] = False


def causal(b, h, q, k):
    return q >= k


def padded(b, h, q, k):
    return (q >= k) & PAD[b, k]


def sliding(b, h, q, k):
    return (q >= k) & (q - k < 32)


def flex_sites(call, *tensors):
    sites = []

    def backend(gm, _inputs):
        sites.extend(find_attention(gm))
        return gm

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(call, backend=backend)(*tensors)
    return sites


@pytest.mark.parametrize(
    ("mask_mod", "window", "with_keys"),
    [(causal, 0, False), (padded, 0, True), (sliding, 32, False)],
    ids=["causal", "padded", "sliding"],
)
def test_flex_attention_is_read_from_its_mask_mod(mask_mod, window, with_keys):
    query, key = torch.randn(B, 4, LONG, D), torch.randn(B, 2, LONG, D)
    block_mask = create_block_mask(mask_mod, B, None, LONG, LONG, device="cpu")

    def call(query, key):
        return flex_attention(
            query,
            key,
            key,
            score_mod=lambda score, b, h, q, k: 20 * torch.tanh(score / 20),
            block_mask=block_mask,
            enable_gqa=True,
        )

    (site,) = flex_sites(call, query, key)
    assert site.mask is not None, site.unproven or site.dense_reason
    assert (site.mask.causal, site.mask.window) == (True, window)
    assert (site.mask.key_mask is not None) == with_keys
    assert site.softcap == pytest.approx(20) and site.num_kv_heads == 2


def test_flex_attention_with_a_score_mod_that_adds_stays_dense():
    query = torch.randn(B, 4, LONG, D)
    (site,) = flex_sites(
        lambda q: flex_attention(q, q, q, score_mod=lambda s, b, h, i, j: s + (j - i)), query
    )
    assert "score_mod" in site.dense_reason


def test_block_mask_of_other_blocks_than_its_mask_mod_is_not_proven():
    counts = torch.ones(1, 1, 2, dtype=torch.int32)
    other = BlockMask.from_kv_blocks(
        counts, torch.zeros(1, 1, 2, 2, dtype=torch.int32), mask_mod=causal
    )
    query = torch.randn(B, 4, LONG, D)
    (site,) = flex_sites(lambda q: flex_attention(q, q, q, block_mask=other), query)
    assert site.mask is None and "blocks of the BlockMask" in site.unproven


# -- sub-graphs -------------------------------------------------------------------------------


def statistics_returned(x):
    scores = x @ x.mT * 0.25
    kept = scores.clone()
    return scores.masked_fill(~seen(N), -1e9).softmax(-1) @ x, kept


def statistics_written_outside(x):
    scores = x @ x.mT * 0.25
    x.add_(scores.clone()[..., :D])
    return scores.masked_fill(~seen(N), -1e9).softmax(-1) @ x


@pytest.mark.parametrize("attention", [statistics_returned, statistics_written_outside])
def test_a_copy_of_the_scores_that_somebody_reads_keeps_them(attention, x):
    sites, _ = record(attention, x)
    assert all("also read by" in found.site.dense_reason for found in sites)
    assert len(sites) == 1
