"""The ops of linear layers that multiply other numbers than those of the model.

`minference::quantize_rows` and `minference::multiply_rows` are of 8 bits,
`minference::linear_in_fp32` of fp32, `minference::linear_in_half` of half precision. What they
mean: lowering/reference/linear.py. Layers that read one tensor share its levels. The weight is an
argument as it is in the model, so that the graph stays right when it changes; its form in 8 bits is
made when it is first used, and kept beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.failures import contain
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.reference import linear

FEWEST_ROWS = 128
"""Rows of the input from which other numbers pay: decoding reads a weight once for each row."""


@define_op("quantize_rows", "(Tensor rows) -> (Tensor, Tensor)")
def quantize_rows(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Rows [.., K] of an input as levels, uint8 [.., K], and steps, fp32 [.., 1]."""
    try:
        return device_lowering(rows.device).quantize_rows(rows)
    except Exception as error:
        contain(error, "rounding the input of a linear layer to 8 bits")
        return linear.quantize_rows(rows)


@fake_of("quantize_rows")
def _(rows: Tensor) -> tuple[Tensor, Tensor]:
    levels = rows.new_empty(rows.shape, dtype=torch.uint8)
    return levels, rows.new_empty((*rows.shape[:-1], 1), dtype=torch.float32)


@define_op("multiply_rows", "(Tensor levels, Tensor weight) -> Tensor")
def multiply_rows(levels: Tensor, weight: Tensor) -> Tensor:
    """Levels [.., K] times a weight [M, K] in 8 bits -> [.., M] in the weight's dtype.

    The steps of the rows are still to be multiplied with.
    """
    try:
        return device_lowering(levels.device).multiply_rows(levels, weight)
    except Exception as error:
        contain(error, "a product of a linear layer in 8 bits")
        return linear.multiply_rows(levels, weight)


@fake_of("multiply_rows")
def _(levels: Tensor, weight: Tensor) -> Tensor:
    return weight.new_empty((*levels.shape[:-1], weight.shape[0]))


@define_op("linear_in_fp32", "(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")
def linear_in_fp32(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of rows [.., K] and a weight [M, K], multiplied in fp32 -> [.., M]."""
    if rows.shape[:-1].numel() < FEWEST_ROWS:
        return torch.nn.functional.linear(rows, weight, bias)
    try:
        return device_lowering(rows.device).linear_in_fp32(rows, weight, bias)
    except Exception as error:
        contain(error, "a linear layer in fp32")
        return torch.nn.functional.linear(rows, weight, bias)


@fake_of("linear_in_fp32")
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))


@define_op("linear_in_half", "(Tensor rows, Tensor weight, Tensor? bias) -> Tensor")
def linear_in_half(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A linear layer of rows [.., K], a weight [M, K] with half-precision products -> [.., M]."""
    if rows.shape[:-1].numel() < FEWEST_ROWS:
        return torch.nn.functional.linear(rows, weight, bias)
    try:
        return device_lowering(rows.device).linear_in_half(rows, weight, bias)
    except Exception as error:
        contain(error, "a linear layer in half precision")
        return torch.nn.functional.linear(rows, weight, bias)


@fake_of("linear_in_half")
def _(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return rows.new_empty((*rows.shape[:-1], weight.shape[0]))
