"""The ceilings of this machine, measured: what every other figure is held against."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch

from benchmarks.gpu.clock import milliseconds
from benchmarks.gpu.setting import Row, Setting, Work


def machine(setting: Setting) -> Iterator[Work]:
    """Memory bandwidth, matrix rate, and what an empty launch costs."""
    for name, measure in (("copy", copy), ("matmul", matmul), ("launch", launch)):
        yield f"machine/{name}", functools.partial(measure, setting)


def copy(setting: Setting) -> Row:
    """Device-to-device copy; bytes read and bytes written count."""
    size = 2**20 if setting.smoke else 2**32
    source = torch.ones(size, dtype=torch.uint8, device=setting.device)
    target = torch.empty_like(source)
    spent = milliseconds(lambda: target.copy_(source), setting.device)
    return {"ms": spent, "tb_per_s": 2 * size / spent / 1e9}


def matmul(setting: Setting) -> Row:
    """A square bf16 product of normal numbers."""
    size = 128 if setting.smoke else 8192
    left, right = (
        torch.randn(size, size, device=setting.device).to(torch.bfloat16) for _ in range(2)
    )
    spent = milliseconds(lambda: left @ right, setting.device)
    return {"ms": spent, "tflops": 2 * size**3 / spent / 1e9}


def launch(setting: Setting) -> Row:
    """A kernel that does next to nothing: the least that any launch takes."""
    tensor = torch.zeros(1, device=setting.device)
    return {"ms": milliseconds(lambda: tensor.add_(1), setting.device)}
