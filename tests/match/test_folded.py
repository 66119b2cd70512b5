"""Attention over tensors that are not [B, H, N, D] is what eager makes of it, or stays dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.eager_equal import BIDIRECTIONAL, INF, D, H, N, causal, compare, hide

sdpa = F.scaled_dot_product_attention
B = 2


@pytest.fixture(autouse=True)
def fresh():
    """Sizes that differ between tests are not dynamic for that."""
    torch._dynamo.reset()


def tensors(*shape):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for _ in range(3)]


def status(sites):
    """What became of sites; "sparse" only where the mask was proven and not read at run time."""
    return [
        site.reason or ("sparse" if site.mask and "run time" not in str(site.mask) else site.mask)
        for site in sites
    ]


def padding(rows=B):
    """Keys of each row that count: [rows, N], other ones in each row."""
    return torch.arange(N) < N - 5 * torch.arange(1, rows + 1)[:, None]


SHAPES = {"3": (B * H, N, D), "5": (B, 3, H, N, D), "6": (1, B, 2, H, N, D), "one head": (B, N, D)}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("form", ["is_causal", "tensor", "none"])
def test_sdpa_of_any_number_of_dimensions_is_sparse(shape, form):
    def program(q, k, v):
        return sdpa(
            q, k, v, is_causal=form == "is_causal", attn_mask=causal() if form == "tensor" else None
        )

    pattern = {"pattern": BIDIRECTIONAL} if form == "none" else {}
    assert status(compare(program, tensors=tensors(*shape), **pattern)) == ["sparse"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_heads_that_are_folded_into_the_batch_are_the_heads_of_the_site(dtype):
    def program(q, k, v):
        q, k, v = (t.reshape(B * H, N, D) for t in (q, k, v))
        return sdpa(q, k, v, is_causal=True).view(B, H, N, D)

    inputs = [t.to(dtype) for t in tensors(B, H, N, D)]
    (site,) = compare(program, tensors=inputs, tolerance=2e-6 if dtype == torch.float32 else 0.02)
    assert (status([site]), site.num_heads) == (["sparse"], H)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_with_the_heads_before_the_batch_are_read_in_their_order(padded):
    """Rows h * B + b: what varies fastest is taken for heads, and its padding differs per head."""

    def program(q, k, v):
        q, k, v = (t.transpose(0, 1).reshape(H * B, N, D) for t in (q, k, v))
        mask = causal()[None]
        return sdpa(q, k, v, attn_mask=mask & padding().repeat(H, 1)[:, None] if padded else mask)

    (site,) = compare(program, tensors=tensors(B, H, N, D))
    assert site.status == ("dense" if padded else "sparse")
    assert ("per head" in site.reason) == padded


MASKS = {
    "of each batch row": lambda: padding().repeat_interleave(H, 0)[:, None],
    "expanded and folded": lambda: padding()[:, None, None].expand(B, H, 1, N).reshape(-1, 1, N),
    "one for all": lambda: causal()[None],
}


@pytest.mark.parametrize("make", MASKS.values(), ids=MASKS)
def test_a_mask_of_folded_rows_is_read_by_batch_and_head(make):
    def program(q, k, v):
        q, k, v = (t.reshape(B * H, N, D) for t in (q, k, v))
        return sdpa(q, k, v, attn_mask=make() & causal())

    (site,) = compare(program, tensors=tensors(B, H, N, D))
    assert (status([site]), site.num_heads) == (["sparse"], H)


def test_a_mask_that_differs_per_head_of_folded_rows_stays_dense():
    def program(q, k, v, keep):
        q, k, v = (t.reshape(B * H, N, D) for t in (q, k, v))
        return sdpa(q, k, v, attn_mask=keep[:, None] & causal())

    (site,) = compare(program, padding(B * H), tensors=tensors(B, H, N, D))
    assert site.status == "dense"
    assert "per head" in site.reason


def test_padding_of_several_batch_dimensions_is_of_the_right_row():
    def program(q, k, v, keep):
        return sdpa(q, k, v, attn_mask=keep[:, :, None, None] & causal())

    keep = padding(6).view(B, 3, N)
    assert status(compare(program, keep, tensors=tensors(B, 3, H, N, D))) == ["sparse"]


def test_padding_that_the_last_batch_dimension_has_is_of_the_right_row():
    def program(q, k, v, keep):
        return sdpa(q, k, v, attn_mask=keep[:, None, None] & causal())

    assert status(compare(program, padding(3), tensors=tensors(B, 3, H, N, D))) == ["sparse"]


def test_a_batch_that_is_broadcast_stays_dense():
    def program(q, k, v):
        return sdpa(q, k[:1], v[:1], is_causal=True)

    (site,) = compare(program, tensors=tensors(B * H, N, D))
    assert "expand" in site.reason


# -- written out --------------------------------------------------------------------------------


def fold(*tensors):
    return [t.reshape(-1, *t.shape[2:]) for t in tensors]


def padded_through_views(q, k, v, pad):
    """fair-esm and fairseq: folded products, and a mask through a view."""
    scores = torch.bmm(q * 0.25, k.transpose(1, 2)).view(B, H, N, N)
    scores = scores.masked_fill(~(causal() & pad[:, None, None]), -INF)
    return torch.bmm(scores.view(B * H, N, N).softmax(-1), v)


def softmax_of_four(q, k, v, pad):
    scores = torch.bmm(q, k.mT).view(B, H, N, N) * 0.25
    weights = scores.masked_fill(~(causal() & pad[:, None, None]), -INF).softmax(-1)
    return torch.bmm(weights.reshape(B * H, N, N), v)


def by_baddbmm(q, k, v, pad):
    """diffusers: nothing is added, and the scale is alpha."""
    bias = torch.empty(B * H, N, N)
    scores = torch.baddbmm(bias, q, k.transpose(-1, -2), beta=0, alpha=0.3)
    mask = torch.zeros(B, 1, N).masked_fill(~pad[:, None], -INF).repeat_interleave(H, 0)
    return torch.bmm((scores + mask).masked_fill(~causal(), -INF).softmax(-1), v)


def by_einsum(q, k, v, pad):
    scores = torch.einsum("b i d, b j d -> b i j", q, k) * 0.25
    hidden = ~pad[:, None].repeat_interleave(H, 0)
    weights = scores.masked_fill(hidden, -INF).masked_fill(~causal(), -INF).softmax(-1)
    return torch.einsum("b i j, b j d -> b i d", weights, v)


WRITTEN = [padded_through_views, softmax_of_four, by_baddbmm, by_einsum]


@pytest.mark.parametrize("program", WRITTEN)
@pytest.mark.parametrize("shown", [True, False], ids=["folds in the graph", "folded outside"])
def test_products_of_folded_heads_are_sparse(program, shown):
    def folding(q, k, v, pad):
        return program(*fold(q, k, v), pad)

    inputs = tensors(B, H, N, D)
    inputs = inputs if shown else fold(*inputs)
    (site,) = compare(folding if shown else program, padding(), tensors=inputs, tolerance=1e-5)
    assert status([site]) == ["sparse"]
    known = shown or program in (padded_through_views, softmax_of_four)
    assert site.num_heads == (H if known else 1)


def test_folded_heads_without_a_mask_are_sparse():
    def program(q, k, v):
        return torch.bmm(torch.bmm(q * 0.25, k.transpose(1, 2)).softmax(-1), v)

    sites = compare(program, tensors=tensors(B * H, N, D), pattern=BIDIRECTIONAL)
    assert status(sites) == ["sparse"]


def test_a_step_with_another_fold_stays_dense():
    """One step sees [B, H], another [H, B]: the second mixes rows of batches and heads."""

    def program(q, k, v, pad):
        scores = torch.bmm(q, k.mT).view(B, H, N, N).masked_fill(~causal(), -INF)
        scores = scores.view(B * H, N, N).view(H, B, N, N).masked_fill(~pad[None, :, None], -INF)
        return torch.bmm(scores.view(B * H, N, N).softmax(-1), v)

    (site,) = compare(program, padding(), tensors=tensors(B * H, N, D))
    assert site.reason == "scores are broadcast or reshaped by view"


def test_scores_whose_heads_are_transposed_on_the_way_stay_dense():
    def program(q, k, v):
        scores = torch.bmm(q, k.mT).view(B, H, N, N).transpose(0, 1).reshape(B * H, N, N)
        return torch.bmm(scores.masked_fill(~causal(), -INF).softmax(-1), v)

    assert status(compare(program, tensors=tensors(B * H, N, D))) != ["sparse"]


def test_a_mask_that_differs_per_folded_row_stays_dense_where_rows_are_heads():
    def program(q, k, v, pad):
        q, k, v = fold(q, k, v)
        scores = torch.bmm(q, k.mT).masked_fill(~(causal() & pad[:, None]), -INF)
        return torch.bmm(scores.softmax(-1), v)

    (site,) = compare(program, padding(B * H), tensors=tensors(B, H, N, D))
    assert "per head" in site.reason


def test_what_baddbmm_adds_is_no_mask():
    def program(q, k, v):
        rows = torch.arange(N * N).view(N, N) % 7.0
        scores = torch.baddbmm(rows.expand(B * H, N, N), q, k.mT, alpha=0.3)
        return torch.bmm(scores.masked_fill(~causal(), -INF).softmax(-1), v)

    (site,) = compare(program, tensors=tensors(B * H, N, D))
    assert "baddbmm adds to the scores what is not known to be" in site.reason


@pytest.mark.parametrize("result", ["bhid", "bihd"])
@pytest.mark.parametrize("keys", ["bjd", "bdj"])
def test_keys_and_values_that_all_heads_share_need_no_dimension_for_them(keys, result):
    """Multi-query attention of x_transformers; each batch row has padding of its own."""

    def program(q, k, v, pad):
        k = k.mT.contiguous() if keys == "bdj" else k
        scores = torch.einsum(f"bhid,{keys}->bhij", q, k) * 0.25
        hidden = ~(causal() & pad[:, None, None])
        weights = scores.masked_fill(hidden, -torch.finfo(scores.dtype).max).softmax(-1)
        # Its layout is einsum's own: eager's and the compiler's differ.
        return torch.einsum(f"bhij,bjd->{result}", weights, v).contiguous()

    q, (k, v) = tensors(B, H, N, D)[0], tensors(B, N, D)[:2]
    (site,) = compare(program, padding(), tensors=[q, k, v])
    assert (status([site]), site.num_heads, site.num_kv_heads) == (["sparse"], H, 1)


def test_keys_that_are_shared_by_the_batch_and_not_by_heads_stay_dense():
    def program(q, k, v):
        weights = hide(torch.einsum("bhid,hjd->bhij", q, k)).softmax(-1)
        return torch.einsum("bhij,hjd->bhid", weights, v)

    q, (k, v) = tensors(B, H, N, D)[0], tensors(H, N, D)[:2]
    assert status(compare(program, tensors=[q, k, v])) != ["sparse"]


def test_operands_written_between_the_products_stay_dense():
    def program(q, k, v):
        q, k, v = (t + 0 for t in (q, k, v))
        scores = torch.bmm(q, k.mT)
        k.mul_(2)
        return torch.bmm(scores.masked_fill(~causal(), -INF).softmax(-1), v) + k.mean()

    (site,) = compare(program, tensors=tensors(B * H, N, D))
    assert "written in place" in site.reason
