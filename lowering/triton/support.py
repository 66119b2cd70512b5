"""What the Triton kernels can serve, and which of them a call needs."""

from __future__ import annotations

import importlib.util

import torch

from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.triton.spec import HEAD_DIMS, TritonKernelSpec

MAX_HEADS = 65535
"""Query heads and batch rows lie on grid axes of this size."""


def unsupported(inputs: AttentionInputs) -> str | None:
    """Why the Triton kernels cannot serve an attention, in words; None if they can.

    Reads dtypes, devices and static shapes only. softcap and sink logits are served whatever they
    are.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if query.device.type != "cuda":
        return f"Triton kernels run on a GPU, not on {query.device.type!r}"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if torch.version.hip is None and torch.cuda.get_device_capability(query.device) < (8, 0):
        return "Triton kernels need compute capability 8.0 (Ampere) or later"
    names = {str(t.dtype).removeprefix("torch.") for t in (query, key, value)}
    if names not in ({"bfloat16"}, {"float16"}):
        return (
            f"Triton kernels take bfloat16 or float16, not {' with '.join(sorted(names))}: "
            "float32 would run through TF32 and lose 13 bits; cast, or use torch.autocast"
        )
    for name, dim in (("head_dim", query.shape[-1]), ("value dim", value.shape[-1])):
        if dim not in HEAD_DIMS:
            return f"{name} {dim} is outside of {HEAD_DIMS.start} to {HEAD_DIMS.stop - 1}"
    if query.shape[1] > MAX_HEADS or query.shape[0] > MAX_HEADS:
        return f"more than {MAX_HEADS} heads or batch rows"
    return None


def made_for(spec: TritonKernelSpec, dtype: torch.dtype, head_dim: int, softcap: bool) -> bool:
    """Whether a kernel serves an attention of this kind.

    Kernels without a head_dim of their own work on scores and indexes.
    """
    return spec.head_dim in (0, head_dim)


def synchronize(device: torch.device) -> None:
    """Wait until a GPU has nothing left to do."""
    torch.cuda.synchronize(device)
