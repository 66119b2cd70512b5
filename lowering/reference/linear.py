"""Linear layers in other numbers, in plain torch: what the ops and kernels of a device mean.

In fp32 a layer of bf16 loses nothing: its products are exact, and its sums are of fp32 anyway.

In half precision, rows are scaled by powers of two, and every few products are summed in half
precision: what that loses is less than what the result loses when it is rounded to bf16.

In 8 bits, rows of the input and rows of the weight are multiplied by the same orthogonal matrix,
which changes no product, and rounded to 8 bits. The matrix is a Hadamard matrix of `GROUP` on the
diagonal: it spreads what is large in a few channels over its group, so that the levels of a row are
not spent on them (QuaRot, Ashkboos et al., arXiv 2404.00456, section 4, with one small matrix for
all models). Nothing is calibrated. Letters: K channels of the input, M of the output.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 64
"""Channels that are rotated together; a power of 2."""

LEVELS = 127
"""The greatest level of a row."""

ZERO = 128
"""The level of zero in rows of the input, which are unsigned: VNNI multiplies such with signed."""

CHAIN = 32
"""Products that are summed in half precision before they are added in fp32,"""

RUN = CHAIN // 2
"""and of these as many in a row: where sums are small, little is lost by rounding them."""

HALF_EXPONENT = 5
"""Rows are scaled so that their greatest number is below 2 to that: CHAIN products stay finite."""


def rotate(rows: Tensor) -> Tensor:
    """The rows [.., K] in fp32, each group of channels times the orthogonal Hadamard matrix.

    K is a multiple of GROUP. Rotating twice gives the rows again.
    """
    shape = rows.shape
    rows = rows.float().reshape(-1, GROUP)
    step = 1
    while step < GROUP:
        pairs = rows.view(-1, GROUP // (2 * step), 2, step)
        even, odd = pairs[:, :, 0], pairs[:, :, 1]
        rows = torch.stack((even + odd, even - odd), dim=2).view(-1, GROUP)
        step *= 2
    return (rows / GROUP**0.5).view(shape)


def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated rows of an input [.., K] as levels, uint8 [.., K], and steps, fp32 [.., 1].

    A rotated number is about (level - ZERO) * step. A row with a number that is not finite has a
    step that is none, and with it all that is computed from it.
    """
    rotated = rotate(rows)
    most = rotated.abs().amax(-1, keepdim=True)
    inverse = torch.where(most > 0, LEVELS / most, 0.0)
    levels = torch.floor(rotated * inverse + (ZERO + 0.5)).nan_to_num(ZERO)
    return levels.to(torch.uint8), most / LEVELS + (rows.float() * 0).sum(-1, keepdim=True)


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A rotated weight [M, K] as levels, int8 [M, K], and steps, fp32 [M]."""
    rotated = rotate(weight)
    most = rotated.abs().amax(-1)
    inverse = torch.where(most > 0, LEVELS / most, 0.0)
    return torch.round(rotated * inverse[:, None]).to(torch.int8), most / LEVELS


def multiply_rows(levels: Tensor, weight: Tensor) -> Tensor:
    """Levels of `quantize_rows` [.., K] times a weight [M, K] in 8 bits -> [.., M] in its dtype.

    The steps of the rows are still to be multiplied with, those of the weight are in.
    """
    weights, steps = quantize_weight(weight)
    # fp64 holds such sums exactly, as the integers of a kernel do.
    sums = (levels.double() - ZERO) @ weights.double().t()
    return (sums * steps).to(weight.dtype)


def linear_in_fp32(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of rows [.., K], weight [M, K] in fp32 -> [.., M] in the rows' dtype."""
    wide = torch.nn.functional.linear(
        rows.float(), weight.float(), None if bias is None else bias.float()
    )
    return wide.to(rows.dtype)


def linear_in_half(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """A linear layer of rows [.., K], weight [M, K] with half-precision products -> [.., M].

    Each sum of RUN products is rounded to half precision after every product, as a fused
    multiply-add does, and so is the sum of two of these; those sums are added in fp32. Rows that
    hold a number which is not finite have no meaning here.
    """
    flat = rows.reshape(-1, rows.shape[-1])
    (left, left_undone), (right, right_undone) = half_rows(flat), half_rows(weight)
    sums = left.new_zeros(flat.shape[0], weight.shape[0], dtype=torch.float32)
    for start in range(0, flat.shape[1], CHAIN):
        chain = torch.zeros_like(sums, dtype=torch.float16)
        for first in range(start, min(start + CHAIN, flat.shape[1]), RUN):
            run = torch.zeros_like(chain)
            for k in range(first, min(first + RUN, flat.shape[1])):
                product = left[:, k, None].double() * right[:, k].double()
                run = rounded_once(run.double() + product)
            chain = rounded_once(chain.double() + run.double())
        sums += chain.float()
    sums = sums * left_undone * right_undone.t()
    if bias is not None:
        sums = sums + bias.float()
    return sums.to(rows.dtype).view(*rows.shape[:-1], weight.shape[0])


def half_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [N, K] times powers of two, in half precision, and what undoes that, fp32 [N, 1]."""
    exponents = torch.frexp(rows.float().abs().amax(-1, keepdim=True)).exponent
    up = torch.ldexp(torch.ones_like(exponents, dtype=torch.float32), HALF_EXPONENT - exponents)
    return (rows.float() * up).half(), 1 / up


def rounded_once(numbers: Tensor) -> Tensor:
    """Numbers of fp64 in half precision.

    Torch goes by fp32, and what it rounds there may then look like a tie that it was not: so the
    last bit of what is not exact in fp32 is made odd (Boldo and Melquiond, 2008, "Emulation of FMA
    and correctly rounded sums: proved algorithms using rounding to odd", theorem 1).
    """
    single = numbers.float()
    lost = numbers - single.double()
    even = single.view(torch.int32) % 2 == 0
    towards = torch.nextafter(single, torch.sign(lost).float() * torch.inf)
    return torch.where((lost != 0) & even, towards, single).half()
