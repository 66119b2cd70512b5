"""What all matchers share: reasons that keep any spelling dense, and the making of sites."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import fx
from torch.utils._sympy.symbol import SymT, symbol_is_type

from mpass.graph.nodes import (
    MADE_HERE,
    example,
    is_tensor,
    layer_index,
    module_path,
    shape_of,
    source_line,
    value_of,
)
from mpass.graph.site import AttentionSite
from mpass.graph.sizes import agree
from mpass.graph.writes import StorageWrites

FLOATS = frozenset({torch.float32, torch.bfloat16, torch.float16})
"""dtypes of masks that are added to scores."""


def shape_reason(query: fx.Node, key: fx.Node, value: fx.Node) -> str:
    """Why three tensors are not [B, H, Nq, D] and [B, Hk, Nk, D|Dv]; "" if they are."""
    shapes = [shape_of(node) for node in (query, key, value)]
    if any(len(shape) != 4 for shape in shapes):
        sizes = ", ".join(str(len(shape)) for shape in shapes)
        return (
            f"query, key, value have {sizes} dimensions and cannot be read as [B, H, N, D]: expand "
            "or reshape them to the same leading sizes"
        )
    q, k, v = shapes
    if not (agree(q[0], k[0]) and agree(q[0], v[0])):
        return f"batch is broadcast: query {q[0]}, key {k[0]}, value {v[0]}"
    if not agree(q[3], k[3]):
        return f"head_dim of query ({q[3]}) and key ({k[3]}) differ"
    if not agree(k[1], v[1]):
        return f"key and value differ in heads: {k[1]} and {v[1]}"
    if not agree(k[2], v[2]):
        return f"key and value differ in length: {k[2]} and {v[2]}"
    if not (isinstance(q[1], int) and isinstance(k[1], int) and isinstance(q[3], int)):
        return "number of heads or head_dim is dynamic"
    if 0 in (q[1], k[1], q[3], v[3]):
        return "there are no heads, or no channels"
    if q[1] % k[1]:
        return f"{q[1]} query heads are no multiple of {k[1]} key/value heads"
    return ""


def readable_mask(
    mask: object, query: fx.Node, key: fx.Node, writes: StorageWrites
) -> fx.Node | None:
    """A mask as the op that reads masks at run time takes it; None if it is no such mask.

    It has a cell for every query and key, is the same for all heads, and nothing writes to it: an
    op reads it at the attention's output, and shares what it has read with other attentions.
    """
    if not isinstance(mask, fx.Node) or not is_tensor(mask) or writes.ever_written(mask):
        return None
    cells = example(mask)
    if not 2 <= cells.dim() <= 4 or not (cells.dtype == torch.bool or cells.dtype in FLOATS):
        return None
    sizes = (shape_of(query)[2], shape_of(key)[2])
    if not (agree(cells.shape[-2], sizes[0]) and agree(cells.shape[-1], sizes[1])):
        return None
    per_head = cells.dim() > 2 and not agree(cells.shape[-3], 1) and cells.stride(-3) != 0
    batched = cells.dim() == 4 and not (
        agree(cells.shape[0], 1) or agree(cells.shape[0], shape_of(query)[0])
    )
    return None if per_head or batched else mask


RECORDED = "gradients are recorded: run under torch.no_grad() or torch.inference_mode()"
"""Why attention that is trained stays dense, where nobody asked for sparse training."""

_trains: ContextVar[bool] = ContextVar("mpass_trains", default=False)


@contextmanager
def training_allowed(allowed: bool) -> Iterator[None]:
    """Whether gradients are no reason to stay dense, of the graph that is matched inside."""
    token = _trains.set(allowed)
    try:
        yield
    finally:
        _trains.reset(token)


def trains() -> bool:
    """Whether attention whose gradients are recorded may become sparse."""
    return _trains.get()


def gradient_reason(output: fx.Node) -> str:
    """Why gradients keep a site dense: unless training is asked for, they do."""
    return RECORDED if example(output).requires_grad and not trains() else ""


def dropout_reason(dropout: object) -> str:
    """Why a dropout probability keeps a site dense; "" for a constant zero."""
    if isinstance(dropout, fx.Node):
        return "dropout probability is not a constant"
    if dropout:
        return f"dropout p={dropout} on attention weights: call model.eval()"
    return ""


def constant_number(value: object) -> float | None:
    """An argument as a number; None if it is none or changes from call to call.

    Under dynamic=True Dynamo reads the floats of a user's modules anew in each call. Such a number
    is fixed here, by a guard on its value. One that depends on a length is not: that would be a
    graph per length.
    """
    if isinstance(value, fx.Node):
        value = value_of(value)
        if not isinstance(value, torch.SymFloat):
            return None
    if isinstance(value, torch.SymFloat):
        expression = value.node.expr
        fixable = symbol_is_type(expression, SymT.FLOAT) if expression.is_Symbol else False
        return float(value) if fixable or expression.is_number else None
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None


def constant_scale(scale: object, query: fx.Node) -> float | None:
    """The scale of the scores as a number, 1/sqrt(D) for None; None if it is not a constant."""
    if scale is None:
        head_dim = shape_of(query)[-1]
        return 1.0 / math.sqrt(head_dim) if isinstance(head_dim, int) and head_dim else None
    return constant_number(scale)


def make_site(output: fx.Node, **fields: Any) -> AttentionSite:
    """A site at `output`, with its place in the user's model filled in."""
    path = module_path(output)
    fields.setdefault("path", path)
    fields.setdefault("layer", layer_index(fields["path"]))
    return AttentionSite(output=output, source=source_line(output), **fields)


def new_node(before: fx.Node, op: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
    """A new call of an op, dead until a rewrite reads it."""
    with before.graph.inserting_before(before):
        result = before.graph.call_function(op, args, kwargs)
    values = [example(arg) if isinstance(arg, fx.Node) else arg for arg in args]
    result.meta["example_value"] = op(*values, **kwargs)
    result.meta[MADE_HERE] = True
    return result
