"""Attention over tensors that are not [B, H, N, D] is what eager makes of it, or stays dense."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.eager_equal import BIDIRECTIONAL, D, H, N, causal, compare

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
    return [site.reason or site.status for site in sites]


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
    assert (site.status, site.num_heads) == ("sparse", H)


@pytest.mark.parametrize("padded", [False, True])
def test_rows_with_the_heads_before_the_batch_are_read_in_their_order(padded):
    """Rows h * B + b: what varies fastest is taken for heads, and its padding differs per head."""

    def program(q, k, v):
        q, k, v = (t.transpose(0, 1).reshape(H * B, N, D) for t in (q, k, v))
        mask = causal()[None]
        return sdpa(q, k, v, attn_mask=mask & padding().repeat(H, 1)[:, None] if padded else mask)

    (site,) = compare(program, tensors=tensors(B, H, N, D))
    assert site.status == ("dense" if padded else "sparse")
    assert ("mask differs per head" in site.reason) == padded


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
    assert (site.status, site.num_heads, site.mask != ()) == ("sparse", H, True)


def test_a_mask_that_differs_per_head_of_folded_rows_stays_dense():
    def program(q, k, v, keep):
        q, k, v = (t.reshape(B * H, N, D) for t in (q, k, v))
        return sdpa(q, k, v, attn_mask=keep[:, None] & causal())

    (site,) = compare(program, padding(B * H), tensors=tensors(B, H, N, D))
    assert site.status == "dense"
    assert "mask differs per head" in site.reason


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
