"""Attention under masks that are trained: the op against the mask written out, ties included."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from mpass.lowering import dynamic_mask  # noqa: F401  (defines the ops)
from mpass.lowering.reference.dynamic_mask import NEVER, find_expiries

OP = torch.ops.minference.dynamic_mask_attention.default
LOWEST = torch.finfo(torch.float64).min


def written_out(
    tensors: list[Tensor], keep: int, offset: int, real: Tensor | None, early: bool
) -> Tensor:
    """The mask as transformers' Doge makes it, or chosen of all keys, and SDPA."""
    query, key, value, bias = tensors
    heads, rows, width = query.shape[1], query.shape[2], key.shape[2]
    unseen = (torch.arange(width) > torch.arange(rows)[:, None] + offset)[None, None]
    unseen = unseen if real is None else unseen | ~real[:, None, None]
    mask = bias.expand(query.shape[0], -1, rows, width)
    lowest = torch.finfo(bias.dtype).min
    numbers = mask if early else mask.masked_fill(unseen, lowest)
    best = torch.topk(numbers, min(keep, width), -1, sorted=False).indices
    unseen = unseen | (torch.zeros_like(numbers).scatter(-1, best, 1.0) == 0)
    mask = mask.masked_fill(unseen, -torch.inf).repeat_interleave(heads // bias.shape[1], 1)
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True
    )
    return out.masked_fill((mask == -torch.inf).all(-1, keepdim=True), 0.0)


@st.composite
def cases(draw: st.DrawFn) -> tuple[list[Tensor], int, int, Tensor | None, bool]:
    batch, rows = draw(st.integers(1, 2)), draw(st.integers(1, 200))
    kv_heads, offset = draw(st.sampled_from([1, 2, 4])), draw(st.sampled_from([0, 0, 37, 64]))
    width = rows + offset + draw(st.sampled_from([0, 0, 9]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    own = draw(st.sampled_from([1, kv_heads, 4]))
    bias = torch.randn(
        draw(st.sampled_from([1, batch])), own, 1, width, generator=generator, dtype=torch.float64
    )
    levels = draw(st.sampled_from([None, None, 0.0, 2.0]))  # ties: everywhere, or at some borders
    bias = bias if levels is None else (bias * levels).round()
    tensors = [
        torch.randn(batch, heads, size, dim, generator=generator, dtype=torch.float64)
        for heads, size, dim in ((4, rows, 6), (kv_heads, width, 6), (kv_heads, width, 5))
    ]
    real = None
    if draw(st.booleans()):
        real = torch.rand(batch, width, generator=generator) > 0.3
    return (
        [*tensors, bias],
        draw(st.sampled_from([1, 7, 64, 130])),
        offset,
        real,
        draw(st.booleans()),
    )


@settings(max_examples=60)
@given(cases())
def test_output_and_gradients_are_those_of_the_mask_written_out(case):
    tensors, keep, offset, real, early = case
    leaves = [tensor.requires_grad_() for tensor in tensors]
    expected = written_out(leaves, keep, offset, real, early)
    found, lse = OP(*leaves, real, keep, LOWEST, early, offset, 0.3)
    assert torch.allclose(found, expected, rtol=1e-9, atol=1e-9)
    assert lse.shape == found.shape[:3]
    grad_out = torch.linspace(-1, 1, found.numel(), dtype=torch.float64).view(found.shape)
    both = (torch.autograd.grad(out, leaves, grad_out) for out in (found, expected))
    for one, other in zip(*both, strict=True):
        assert torch.allclose(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_and_keys_of_fewer_digits(dtype):
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(1, h, 150, 8, generator=generator).to(dtype) for h in (4, 2, 2)]
    tensors.append(torch.randn(1, 2, 1, 150, generator=generator))
    expected = written_out([t.double() for t in tensors], 20, 0, None, False)
    found, _ = OP(*tensors, None, 20, -3e38, False, 0, 0.3)
    assert found.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    assert torch.allclose(found.double(), expected, atol=tolerance)


@pytest.mark.parametrize("number", [torch.inf, torch.nan, -torch.inf])
def test_what_is_no_number_is_chosen_as_torch_chooses_it(number):
    tensors = [torch.randn(1, 2, 90, 8) for _ in range(3)] + [torch.randn(1, 2, 1, 90)]
    tensors[3][..., 40] = number
    found, _ = OP(*tensors, None, 16, float(torch.finfo(torch.float32).min), False, 0, 0.3)
    expected = written_out(tensors, 16, 0, None, False)
    assert torch.allclose(found, expected, atol=1e-5, equal_nan=True)


def test_an_expiry_says_until_when_a_key_is_among_the_best():
    numbers = torch.tensor([[3.0, 1.0, 2.0, 5.0, 0.0, 4.0]])
    expiry, tied = find_expiries(numbers, torch.ones_like(numbers, dtype=torch.bool), 2)
    assert expiry.tolist() == [[5, 2, 3, NEVER, 4, NEVER]]
    assert not tied.any()
    _, tied = find_expiries(numbers.fill_(1.0), torch.ones_like(numbers, dtype=torch.bool), 2)
    assert tied.tolist() == [[False, False, True, True, True, True]]


def test_the_ops_pass_opcheck():
    tensors = [torch.randn(2, 30, h, 8).transpose(1, 2) for h in (4, 2, 2)]
    tensors.append(torch.randn(2, 30, 2).transpose(1, 2)[:, :, None])
    rest = (None, 8, -3e38, False, 0, 0.3)
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    torch.library.opcheck(OP, (*leaves, *rest))
    results = OP(*tensors, *rest)
    backward = torch.ops.minference.dynamic_mask_backward.default
    torch.library.opcheck(backward, (torch.ones_like(results[0]), *results, *tensors, *rest))


def test_two_runs_give_the_same_bits():
    tensors = [torch.randn(1, h, 300, 16, requires_grad=True) for h in (4, 2, 2)]
    tensors.append(torch.randn(1, 2, 1, 300, requires_grad=True))

    def run() -> list[Tensor]:
        out, _ = OP(*tensors, None, 40, -3e38, False, 0, 0.3)
        return [out, *torch.autograd.grad(out.square().sum(), tensors)]

    for one, other in zip(run(), run(), strict=True):
        assert torch.equal(one, other)


SHAPES = [
    (2, 4, 1, 6),
    (1, 4, 1, 6),
    (2, 2, 1, 6),
    (2, 1, 1, 6),
    (8, 1, 6),
    (4, 1, 6),
    (1, 6),
    (6,),
]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("shifted", [False, True])
def test_a_bias_in_more_channels_passes_gradcheck(shape, shifted):
    def leaf(*sizes: int) -> Tensor:
        return torch.randn(sizes, dtype=torch.float64, requires_grad=True)

    def weights(query: Tensor, key: Tensor, bias: Tensor) -> Tensor:
        op = torch.ops.minference.with_key_bias.default
        wider = op(query, key, bias, 2.0, 0.3, shifted)
        return torch.softmax(wider[0] @ wider[1].repeat_interleave(2, 1).mT * 0.3, -1)

    given_to_it = leaf(2, 4, 5, 3), leaf(2, 2, 6, 3), leaf(*shape)
    assert torch.autograd.gradcheck(weights, given_to_it, fast_mode=True)
