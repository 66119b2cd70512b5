"""The outermost frame that Dynamo compiles: its local variables, and the module that it belongs to.

They come from Dynamo's private tracing state, which is read here alone. Where it is not there
(torch.export, a graph made by hand) nothing is known.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn

SELF = "L['self']"
"""Dynamo's path of the module whose own forward is compiled."""


def root_frame() -> Any:
    """Dynamo's translator of the outermost frame being compiled; None outside of Dynamo."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        return InstructionTranslator.current_tx().output.root_tx
    except (ImportError, AttributeError):
        return None


def root_locals() -> Mapping[str, Any]:
    """Local variables of the outermost frame being compiled; empty outside of Dynamo."""
    found: Mapping[str, Any] = getattr(root_frame(), "f_locals", {})
    return found


def receiver() -> str:
    """Dynamo's path of the module whose forward the outermost frame is.

    The frame of a decorator may have no `self`, but `*args`, the first of which the module is. A
    function that is given layers as `*layers` has a module there, too, but is not its forward.
    """
    frame = root_frame()
    code = getattr(frame, "f_code", None)
    if code is None or "self" in frame.f_locals:
        return SELF
    if code.co_argcount:
        name = code.co_varnames[0]
        path, first = f"L['{name}']", frame.f_locals.get(name)
    elif code.co_flags & inspect.CO_VARARGS:
        name = code.co_varnames[code.co_kwonlyargcount]
        path, first = f"L['{name}'][0]", next(iter(frame.f_locals.get(name, ())), None)
    else:
        return SELF
    return path if isinstance(first, nn.Module) and is_wrapper_of(first, code) else SELF


def is_wrapper_of(module: nn.Module, code: Any) -> bool:
    """Whether code is that of the module's forward, or of what a decorator put around one."""
    forward: Any = getattr(type(module), "forward", None)
    while forward is not None:
        if getattr(forward, "__code__", None) is code:
            return True
        forward = getattr(forward, "__wrapped__", None)
    return False
