"""What the ops of this library compute, as plain functions: called without torch's dispatcher."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._library.custom_ops import OPDEFS

from mpass.lowering.define import FUNCTIONS, NAMESPACE


def op_functions() -> dict[str, Callable[..., Any]]:
    """Every op's function by the name that the op has after `minference::`."""
    prefix = f"{NAMESPACE}::"
    others = {
        name.removeprefix(prefix): op._init_fn
        for name, op in OPDEFS.items()
        if name.startswith(prefix)
    }
    return {**FUNCTIONS, **others}
