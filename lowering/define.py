"""How the ops of rewritten graphs are defined: by torch.library, without what calls need not pay.

torch.library.custom_op puts two layers of Python around the function of an op, autograd's and a
check of aliases, and each turns all arguments into objects of Python and back. An op of a pattern
has a list of numbers per field with one number per head: on a host that has to wait for each call,
three quarters of what the call costs. What the layers are for is seen to otherwise: the checks are
those of torch.library.opcheck, in the tests, and an op without a formula for gradients says so when
it is called and not when the gradient is asked for.

Ops that write to an argument or have gradients keep torch.library.custom_op, which knows how.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from mpass.errors import GradientError

NAMESPACE = "minference"

FUNCTIONS: dict[str, Callable[..., Any]] = {}
"""What the ops of `define_op` compute, by the names that they have after `minference::`."""

_LIBRARIES: dict[str, torch.library.Library] = {}
"""What keeps each op alive: torch forgets an op with its library."""


def define_op(
    name: str, schema: str, *, chooses: bool = False, tags: Sequence[torch.Tag] = ()
) -> Callable[[Callable[..., Any]], torch._ops.OpOverload]:
    """Make a function the op `minference::<name>`, on every device, instead of any before it.

    schema: of the arguments and results, as torch.library.define takes it; results are new tensors.
    chooses: the results are indexes, counts and truth values, to which no gradient flows. Any other
    op raises GradientError where an argument needs a gradient that is being recorded.
    """

    def decorate(function: Callable[..., Any]) -> torch._ops.OpOverload:
        forget_op(name)
        library = torch.library.Library(NAMESPACE, "FRAGMENT")
        library.define(name + schema, tags=(torch.Tag.pt2_compliant_tag, *tags))
        kernel = function if chooses else without_gradients(name, function)
        library.impl(name, torch._disable_dynamo(kernel), "CompositeExplicitAutograd")
        _LIBRARIES[name], FUNCTIONS[name] = library, function
        op: torch._ops.OpOverload = getattr(getattr(torch.ops, NAMESPACE), name).default
        return op

    return decorate


def fake_of(name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Register what gives the results of an op of `define_op` from arguments without numbers."""
    return cast(
        Callable[[Callable[..., Any]], Callable[..., Any]],
        torch.library.register_fake(f"{NAMESPACE}::{name}", lib=_LIBRARIES[name]),
    )


def forget_op(name: str) -> None:
    """Remove the op of `define_op` that has this name, if there is one."""
    library = _LIBRARIES.pop(name, None)
    if library is not None:
        library._destroy()
        del FUNCTIONS[name]


def without_gradients(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, refusing arguments that need a gradient.

    Below autograd torch would only warn of it, and only where the gradient is asked for.
    """

    def kernel(*arguments: Any) -> Any:
        if torch.is_grad_enabled() and any(
            isinstance(one, Tensor) and one.requires_grad for one in arguments
        ):
            raise GradientError(f"an input of {NAMESPACE}::{name}")
        return function(*arguments)

    return kernel
