"""Which products of linear layers this processor is fastest at: timed once per machine and kept."""

from __future__ import annotations

import functools

import torch

from mpass.lowering.cpu.cost_constants import kept_or_measured, least_seconds, one_thread
from mpass.lowering.cpu.cost_model import LinearConstants
from mpass.lowering.cpu.linear import linear_in_fp32
from mpass.lowering.cpu.linear_half import half_linear_reason, linear_in_half

LINEAR_SIZE = (1024, 1024, 768)
"""Rows, inputs and outputs of the layer that is timed."""

LINEAR_REPEATS = 8

HALF_GAIN = 0.9
"""Time in half precision over the least of the other ways up to which it is taken unasked: it
rounds what they do not, and all processes must come to the same. Processors have 0.6 to 0.7."""


def fp32_linear_pays(dtype: torch.dtype) -> bool:
    """Whether linear layers of a dtype are faster with their numbers made fp32 here."""
    found = linear_constants(dtype)
    return found is not None and found.bf16 > found.fp32


def half_linear_pays(dtype: torch.dtype) -> bool:
    """Whether linear layers of a dtype are fastest here with half-precision products, and no
    farther from fp32 than the dtype's own rounding of results: those of bf16, not of fp16.
    """
    found = linear_constants(dtype)
    return found is not None and 0 < found.half < HALF_GAIN * min(found.bf16, found.fp32)


@functools.cache
def linear_constants(dtype: torch.dtype) -> LinearConstants | None:
    """What a linear layer of a dtype costs here, from the user's cache or timed; None if nobody has
    a choice.
    """
    if dtype != torch.bfloat16:
        return None
    return kept_or_measured(
        "linear layers in bf16, fp32"
        + ("" if half_linear_reason(dtype) else " and half precision"),
        lambda numbers: LinearConstants(**numbers),
        measure_linear,
        lambda constants: "" if constants.bf16 > 0 < constants.fp32 else "they took no time",
    )


def measure_linear() -> LinearConstants:
    """Time a linear layer in bf16, with its numbers made fp32, and in half precision where that is
    possible, in turns, on one thread.
    """
    rows, inputs, outputs = LINEAR_SIZE
    generator = torch.Generator("cpu").manual_seed(0)
    x, weight = (
        torch.randn(size, inputs, device="cpu", generator=generator).to(torch.bfloat16)
        for size in (rows, outputs)
    )
    runs = [
        lambda: torch.nn.functional.linear(x, weight),
        lambda: linear_in_fp32(x, weight),
        *([] if half_linear_reason(x.dtype) else [lambda: linear_in_half(x, weight)]),
    ]
    with one_thread():
        return LinearConstants(*least_seconds(runs, LINEAR_REPEATS))
