"""Linear layers in other numbers, in plain torch: what the ops and kernels of a device mean.

In fp32 a layer of bf16 loses nothing: its products are exact, and its sums are of fp32 anyway.

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
