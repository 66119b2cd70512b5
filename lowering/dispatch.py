"""Which lowering runs an op: generated C++ on a CPU, generated Triton on a GPU, plain torch else.

A lowering is a module with `unsupported(...)`, `sparse_attention(...)` and the estimators of
`mpass.lowering.reference.vertical_slash`; `unsupported` tells in words why it cannot serve a call,
or None.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from mpass.lowering.reference import attention as reference
from mpass.lowering.reference import dense
from mpass.lowering.reference import sample_attention as estimate_sampled
from mpass.lowering.reference import vertical_slash as estimate

PLAIN = (reference, estimate, estimate_sampled, dense)
"""Modules of the implementations in plain torch."""


@dataclass(frozen=True, slots=True)
class Lowering:
    """A chosen lowering. name: "cpu", "triton" or "reference"; reason: why it is the reference."""

    name: str
    reason: str = ""

    def function(self, name: str) -> Callable[..., Any]:
        """The lowering's own version of an op's implementation, plain torch where it has none."""
        if self.name != "reference":
            module = importlib.import_module(f"mpass.lowering.{self.name}")
            own: Callable[..., Any] | None = getattr(module, name, None)
            if own is not None:
                return own
        plain = next(m for m in PLAIN if name in vars(m))
        found: Callable[..., Any] = getattr(plain, name)
        return found


def choose_lowering(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> Lowering:
    """The lowering that serves these tensors; reads dtype, device and static shapes only."""
    device = query.device.type
    name = {"cpu": "cpu", "cuda": "triton"}.get(device)
    if name is None:
        return Lowering("reference", f"no kernels are generated for device {device!r}")
    module = importlib.import_module(f"mpass.lowering.{name}")
    reason = module.unsupported(query, key, value, softcap=softcap, sinks=sinks)
    return Lowering("reference", reason) if reason else Lowering(name)
