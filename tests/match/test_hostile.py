"""Programs that are nearly attention: what they compute stays eager's, sparse or not.

The patterns select every key, so a sparse site computes what eager does. Each program that has to
stay dense stands beside a neighbour that becomes sparse.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import mpass
from tests.helpers.eager_equal import (
    BIDIRECTIONAL,
    FULL,
    INF,
    D,
    H,
    N,
    attend,
    causal,
    compare,
    hide,
    operands,
)
from tests.helpers.toys import EVERY_KEY

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- scores must be themselves where a key is seen --------------------------------------------


def some_scores_zeroed(q, k, v):
    scores = (q @ k.mT * 0.2).masked_fill((torch.arange(N) % 3 == 0), 0.0)
    return hide(scores).softmax(-1) @ v


def own_score_zeroed(q, k, v):
    own = torch.arange(N)[:, None] == torch.arange(N)
    return hide(torch.where(own, 0.0, q @ k.mT * 0.2)).softmax(-1) @ v


def own_score_raised(q, k, v):
    return hide(q @ k.mT * 0.2 + torch.eye(N)).softmax(-1) @ v


def maximum_before_softcap(q, k, v):
    scores = q @ k.mT
    scores = 5 * torch.tanh((scores - scores.amax(-1, keepdim=True)) / 5)
    return hide(scores).softmax(-1) @ v


def maximum_before_sinks(q, k, v):
    scores = hide(q @ k.mT * 0.2)
    scores = scores - scores.amax(-1, keepdim=True)
    sinks = torch.zeros(1, H, N, 1)
    return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1] @ v


def rounded_scores(dtype):
    def program(q, k, v):
        return hide((q @ k.mT * 0.2).to(dtype).to(q.dtype)).softmax(-1) @ v

    return program


def rounded_weights(dtype):
    def program(q, k, v):
        return hide(q @ k.mT * 0.2).softmax(-1).to(dtype).to(q.dtype) @ v

    return program


def first_rows_see_nothing(q, k, v):
    seen = causal() & (torch.arange(N) >= 10)
    return (q @ k.mT * 0.2).masked_fill(~seen, -1e9).softmax(-1) @ v


def mask_and_is_causal(q, k, v):
    mask = torch.ones(N, N, dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=True)


NARROW = [torch.int32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16]

DENSE = {
    "some scores zeroed": (some_scores_zeroed, "scores are replaced"),
    "own score zeroed": (own_score_zeroed, "scores are replaced"),
    "own score raised": (own_score_raised, "not known to be a mask"),
    "maximum before softcap": (maximum_before_softcap, "maximum"),
    "maximum before sinks": (maximum_before_sinks, "maximum"),
    "first rows see nothing": (first_rows_see_nothing, "rows that see no key"),
    "mask and is_causal": (mask_and_is_causal, "together with is_causal"),
    **{f"scores of {dtype}": (rounded_scores(dtype), "rounded") for dtype in NARROW},
    **{f"weights of {dtype}": (rounded_weights(dtype), "rounded") for dtype in NARROW},
}


@pytest.mark.parametrize("name", DENSE)
def test_what_is_no_attention_stays_dense(name):
    program, words = DENSE[name]
    (site,) = compare(program)
    assert site.status == "dense" and words in site.reason


def masked_by_large_number(q, k, v):
    return (q @ k.mT * 0.2).masked_fill(~causal(), -1e9).softmax(-1) @ v


def maximum_after_sinks(q, k, v, logits):
    scores = hide(q @ k.mT * 0.2)
    joined = torch.cat([scores, logits.view(1, -1, 1, 1).expand(1, H, N, 1)], -1)
    return (joined - joined.amax(-1, keepdim=True)).softmax(-1)[..., :-1] @ v


def one_sink_for_all(q, k, v, logit):
    joined = torch.cat([hide(q @ k.mT), logit.view(1, 1, 1, 1).expand(1, H, N, 1)], -1)
    return joined.softmax(-1)[..., :-1] @ v


def wide(q, k, v):
    return hide((q @ k.mT * 0.2).double()).softmax(-1).to(q.dtype) @ v


SPARSE = {
    "masked by -1e9": (masked_by_large_number, ()),
    "maximum after sinks": (maximum_after_sinks, (torch.linspace(-1, 1, H),)),
    "one sink": (one_sink_for_all, (torch.tensor([3.0]),)),
    "every second sink": (maximum_after_sinks, (torch.linspace(-1, 1, 2 * H)[::2],)),
    "wide": (wide, ()),
}


@pytest.mark.parametrize("name", SPARSE)
def test_what_is_attention_becomes_sparse(name):
    program, extra = SPARSE[name]
    (site,) = compare(program, *extra)
    assert site.status == "sparse", site.reason


def test_rows_without_keys_are_told_where_they_are_padding():
    def program(q, k, v, keep):
        seen = causal() & keep[:, None, None]
        out = (q @ k.mT * 0.2).masked_fill(~seen, -1e9).softmax(-1) @ v
        return out * keep[:, None, :, None]

    (site,) = compare(program, (torch.arange(N) >= 50)[None])
    assert site.status == "sparse"
    assert any("rows that see no key are padding" in line for line in site.mask)


# -- arguments by keyword ---------------------------------------------------------------------


def softmax_input(q, k, v):
    return F.softmax(input=hide(q @ k.mT * 0.2), dim=-1) @ v


def div_other(q, k, v):
    return hide(torch.div(q @ k.mT, other=5.0)).softmax(-1) @ v


def everything_by_keyword(q, k, v):
    scores = torch.mul(input=torch.matmul(input=q, other=k.mT), other=0.2)
    scores = torch.add(input=scores, other=torch.full((N, N), -INF).triu(1))
    scores = torch.sub(scores, other=scores.amax(dim=-1, keepdim=True))
    weights = F.dropout(input=scores.softmax(dim=-1), p=0.5, training=False)
    return torch.matmul(input=weights, other=v)


def cat_tensors(q, k, v):
    logits = torch.zeros(1, H, N, 1)
    return torch.cat(tensors=[hide(q @ k.mT), logits], dim=-1).softmax(-1)[..., :-1] @ v


def keywords_elsewhere(q, k, v):
    other = F.softmax(input=torch.cat(tensors=[q, q], dim=-1)[..., :D], dim=-1)
    out = F.scaled_dot_product_attention(query=q, key=k, value=v, is_causal=True)
    return out + torch.div(other, other=2.0)


@pytest.mark.parametrize(
    ("program", "status"),
    [
        (softmax_input, "sparse"),
        (div_other, "sparse"),
        (everything_by_keyword, "sparse"),
        (cat_tensors, "dense"),  # sinks that are no tensor of one number per head
        (keywords_elsewhere, "sparse"),
    ],
)
def test_arguments_may_be_given_by_keyword(program, status):
    (site,) = compare(program)
    assert site.status == status


# -- the replacement is what it replaces ------------------------------------------------------


def viewed(q, k, v):
    return (hide(q @ k.mT * 0.2).softmax(-1) @ v).view(H, N, D)


def strided(q, k, v):
    out = hide(q @ k.mT * 0.2).softmax(-1) @ v
    return torch.as_strided(out, (H, N, D), (N * D, D, 1))


def returned(q, k, v):
    return hide(q @ k.mT * 0.2).softmax(-1) @ v


def rearranged(q, k, v):
    return (hide(q @ k.mT * 0.2).softmax(-1) @ v).transpose(1, 2).reshape(1, N, H * D)


@pytest.mark.parametrize("program", [viewed, strided, returned, rearranged])
def test_output_keeps_its_layout(program):
    (site,) = compare(program)
    assert site.status == "sparse", site.reason


def autocast(attention):
    def program(q, k, v):
        with torch.autocast("cpu", torch.bfloat16):
            return attention(q, k, v)

    return program


@pytest.mark.parametrize(
    "attention", [returned, lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True)]
)
def test_output_has_the_dtype_of_autocast(attention):
    (site,) = compare(autocast(attention), tolerance=0.05)
    assert site.status == "sparse", site.reason


def in_sdpa(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("attention", [returned, in_sdpa], ids=["written out", "sdpa"])
@pytest.mark.parametrize("narrow", [(), (2,), (0, 1), (1, 2)])
def test_autocast_around_the_call_is_followed_for_mixed_dtypes(attention, narrow):
    """Rotary embeddings and norms leave queries and keys in fp32 where values are bf16."""
    given = list(operands())
    for place in narrow:
        given[place] = given[place].bfloat16()
    options = {"inner_backend": "eager", "min_seq_len": 1, "pattern": EVERY_KEY, "dense_above": 2}
    compiled = torch.compile(attention, backend="minference", options=options)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        expected, got = attention(*given), compiled(*given)
    (site,) = mpass.last_report().sites
    assert site.status == "sparse", site.reason
    assert got.dtype == expected.dtype == torch.bfloat16
    assert torch.allclose(got.float(), expected.float(), atol=0.05)


@pytest.mark.parametrize(("heads", "dim"), [(0, D), (H, 0)])
def test_attention_of_nothing_stays_dense(heads, dim):
    def program(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=0.2)

    (site,) = compare(program, tensors=operands(heads, dim))
    assert "no heads, or no channels" in site.reason


@pytest.mark.parametrize("heads", [0])
def test_attention_of_no_heads_written_out_stays_dense(heads):
    (site,) = compare(returned, tensors=operands(heads))
    assert site.status == "dense"


# -- lengths from data, transforms ------------------------------------------------------------


def length_in_mask(q, k, v, size):
    length = size.item()
    torch._check(length > 0)
    torch._check(length <= N)
    return F.scaled_dot_product_attention(q, k, v, causal() & (torch.arange(N) < length))


def length_of_keys(q, k, v, size):
    length = size.item()
    torch._check(length >= 16)
    torch._check(length <= N)
    return F.scaled_dot_product_attention(q, k[:, :, :length], v[:, :, :length])


def test_a_length_of_keys_from_data_stays_dense():
    size = torch.tensor([100])
    (site,) = compare(length_of_keys, size, pattern=BIDIRECTIONAL, capture_scalars=True)
    assert "known at run time only" in site.reason


def test_a_length_from_data_in_a_mask_is_a_key_mask():
    size = torch.tensor([100])
    (site,) = compare(length_in_mask, size, capture_scalars=True)
    assert site.status == "sparse", site.reason


def in_vmap(q, k, v):
    return torch.vmap(attend)(q[None], k[None], v[None])


def in_grad(q, k, v):
    return torch.func.grad(lambda x: attend(x, k, v).sum())(q)


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("program", [in_vmap, in_grad])
def test_attention_inside_of_a_transform_stays_dense(program):
    (site,) = compare(program)
    assert "torch.vmap or torch.func" in site.reason


def beside_vmap(q, k, v):
    return torch.vmap(lambda x: x * 2 + x.sum())(attend(q, k, v))


def beside_grad(q, k, v):
    return torch.func.grad(lambda x: (x * x).sum())(attend(q, k, v))


def beside_jacrev(q, k, v):
    return torch.func.jacrev(lambda x: (x * x).sum(-1))(attend(q, k, v)[0, 0, 0])


@pytest.mark.parametrize("program", [beside_vmap, beside_grad, beside_jacrev])
def test_attention_beside_a_transform_becomes_sparse(program):
    (site,) = compare(program, tolerance=1e-5)
    assert site.status == "sparse", site.reason


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_bidirectional_flex_attention_becomes_sparse():
    def program(q, k, v):
        return flex_attention(q, k, v)

    (site,) = compare(program, pattern=BIDIRECTIONAL)
    assert site.status == "sparse", site.reason


@torch.compiler.nested_compile_region
def in_region(q, k, v):
    return attend(q, k, v)


def test_each_call_of_a_region_has_its_own_pattern():
    def program(q, k, v):
        with mpass.configure(pattern=mpass.BlockSparse(1 << 20)):
            first = in_region(q, k, v)
        with mpass.configure(pattern=FULL):
            return first + in_region(q, v, k)

    sites = compare(program, tolerance=1e-5)
    assert [site.patterns[0].split("(")[0] for site in sites] == ["block_sparse", "vertical_slash"]


def test_finite_masks_of_static_caches_stay_sparse():
    def program(q, k, v):
        positions = torch.arange(N)
        seen = (positions <= positions[:, None]) & (positions < N - 10)
        return (q @ k.mT * 0.2).masked_fill(~seen, -1e9).softmax(-1) @ v

    (site,) = compare(program)
    assert site.status == "sparse", site.reason
