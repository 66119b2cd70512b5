"""Run generated kernels in Triton's interpreter: no GPU, no environment variable.

Triton decides when a function is decorated whether it is interpreted. That of the generated module
is decided by `source.load`; the functions of triton.language that are kernels themselves (sum, max,
cumsum, ...) were decorated at import, so they are swapped for the time of a launch. The interpreter
itself replaces the language's builtins while it runs and forgets some where kernels call kernels,
after which nothing can be compiled any more; so the whole language is put back afterwards. It also
replaces them anew at each call of a function by a function, which took half of the time of a
launch; here a module's functions find the language replaced from the first call on.
Used by tests and by the benchmark's dry run; never on a user's path.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


@contextlib.contextmanager
def interpreted_language() -> Iterator[None]:
    """triton.language with interpreted versions of its own jitted functions, restored on exit."""
    import triton.language as tl
    from triton.runtime import interpreter

    jitted = [(space, name, fn) for space in (tl, tl.standard) for name, fn in _jitted(space)]
    kept = [(space, dict(vars(space))) for space in _spaces()]
    patch = interpreter._patch_lang
    patched: set[int] = set()

    def patch_once(fn: Any) -> Any:
        if id(fn.__globals__) in patched:
            return interpreter._LangPatchScope()
        patched.add(id(fn.__globals__))
        return patch(fn)

    interpreter._patch_lang = patch_once
    try:
        for space, name, fn in jitted:
            setattr(space, name, _interpreted(fn))
        yield
    finally:
        interpreter._patch_lang = patch
        for space, content in kept:
            _restore(space, content)


def _spaces() -> list[Any]:
    """The modules of triton.language and the classes of its values."""
    import triton.language as tl

    modules = [tl, tl.core, tl.math, tl.standard]
    return modules + [value for value in vars(tl.core).values() if isinstance(value, type)]


def _restore(space: Any, content: dict[str, Any]) -> None:
    """Give a module or class the values that it had; names that are new there harm nobody."""
    for name, value in content.items():
        if vars(space).get(name) is not value:
            setattr(space, name, value)


def _jitted(space: Any) -> list[tuple[str, Any]]:
    # gluon asserts at its import that these functions are jitted ones; it must come first.
    import triton.experimental.gluon  # noqa: F401
    from triton.runtime.jit import JITFunction

    return [(name, fn) for name, fn in vars(space).items() if isinstance(fn, JITFunction)]


@functools.cache
def _interpreted(fn: Any) -> Any:
    from triton.runtime.interpreter import InterpretedFunction

    return InterpretedFunction(fn.fn)


def interpreted(device: torch.device) -> bool:
    """Whether kernels over tensors of a device run in the interpreter."""
    return device.type == "cpu"


def upcast(tensor: Tensor) -> Tensor:
    """The interpreter computes bfloat16 on raw bits, wrongly and silently: fp32 in its place."""
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
