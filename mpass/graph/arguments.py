"""The arguments of a call by name, whichever way they were given.

`torch.softmax(x, -1)`, `x.softmax(dim=-1)` and `F.softmax(input=x, dim=-1)` are the same call.
Overloads of torch's operators say their arguments in their schema and functions in Python in their
signature; the builtin functions and methods that attention is written with stand in a table. What
cannot be bound has no arguments: nothing is guessed about it.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Iterator
from typing import Any

from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket

from mpass.graph.nodes import is_tensor, op_name

PARAMETERS: dict[str, str] = {
    "softmax": "input dim dtype",
    "linear": "input weight bias",
    "matmul": "input other",
    "bmm": "input mat2",
    "baddbmm": "input batch1 batch2",
    "mul multiply": "input other",
    "div divide truediv true_divide": "input other",
    "add sub subtract": "input other",
    "masked_fill": "input mask value",
    "where": "condition input other",
    "tanh contiguous clone detach float double half bfloat16": "input",
    "to": "input target",
    "type": "input dtype",
    "type_as expand_as view_as reshape_as": "input other",
    "cat concat concatenate": "tensors dim",
    "getitem": "input index",
    "max": "input dim keepdim",
    "amax logsumexp": "input dim keepdim",
    "sigmoid": "input",
    "unsqueeze": "input dim",
    "maximum": "input other",
    "clamp clip": "input min max",
    "clamp_min": "input min",
    "dropout feature_dropout": "input p train",
    "eq": "input other",
    "topk": "input k dim largest sorted",
    "scatter": "input dim index src",
    "scaled_dot_product_attention": "query key value attn_mask dropout_p is_causal",
    "native_multi_head_attention": "query key value embed_dim num_head qkv_weight qkv_bias "
    "proj_weight proj_bias mask need_weights average_attn_weights mask_type",
    "transformer_encoder_layer_fwd": "src embed_dim num_heads qkv_weight qkv_bias proj_weight "
    "proj_bias use_gelu norm_first eps norm_weight_1 norm_bias_1 norm_weight_2 norm_bias_2 "
    "ffn_weight_1 ffn_bias_1 ffn_weight_2 ffn_bias_2 mask mask_type",
}
"""Names of the positional arguments of builtins, in order, by the name of the op."""

METHODS: dict[str, str] = {"where": "input condition other"}
"""Methods whose order of arguments is another one than the function's."""

SYNONYMS = {
    "self": "input",
    "a": "input",
    "x": "input",
    "x1": "input",
    "x2": "other",
    "axis": "dim",
    "keepdims": "keepdim",
    "training": "train",
}
"""Names that schemas, signatures and torch's NumPy-like keywords have for the same argument."""


@functools.cache
def parameters_of_builtin(name: str, method: bool) -> tuple[str, ...] | None:
    """The positional arguments of a builtin; None if the table does not have it."""
    if method and name in METHODS:
        return tuple(METHODS[name].split())
    return next((tuple(v.split()) for k, v in PARAMETERS.items() if name in k.split()), None)


@functools.cache
def parameters_of(target: Any) -> tuple[str, ...] | None:
    """The arguments of an overload, a function in Python or a higher-order op; None for others.

    An operator that is called without naming its overload has them if there is but one; with
    several there is one list of arguments per overload.
    """
    if isinstance(target, OpOverloadPacket) and len(target.overloads()) == 1:
        target = getattr(target, target.overloads()[0])
    if isinstance(target, OpOverload):
        return tuple(argument.name for argument in target._schema.arguments)
    if isinstance(target, HigherOrderOperator):
        target = types.MethodType(type(target).__call__, target)
    elif not isinstance(target, types.FunctionType):
        return None
    parameters = inspect.signature(target).parameters.values()
    if any(parameter.kind == parameter.VAR_POSITIONAL for parameter in parameters):
        return None
    return tuple(parameter.name for parameter in parameters)


def bind(node: fx.Node) -> dict[str, Any]:
    """The arguments that a call gives, by name; empty if they cannot be named."""
    if node.op not in ("call_function", "call_method"):
        return {}
    method = node.op == "call_method"
    names = None if method else parameters_of(node.target)
    if names is None:
        names = parameters_of_builtin(op_name(node), method)
    if names is None or len(node.args) > len(names):
        return {}
    bound = dict(zip(names, node.args, strict=False)) | node.kwargs
    return {SYNONYMS.get(name, name): value for name, value in bound.items()}


def argument(node: fx.Node, name: str, default: Any = None) -> Any:
    """One argument of a call by name; the default where it is not given."""
    return bind(node).get(name, default)


def tensor_arguments(node: fx.Node) -> Iterator[fx.Node]:
    """The tensors that a call is given itself, by place and by keyword, not inside of lists."""
    for value in (*node.args, *node.kwargs.values()):
        if isinstance(value, fx.Node) and is_tensor(value):
            yield value


def subject(node: fx.Node) -> Any:
    """What a call is applied to: its first argument, however it is given."""
    if node.args:
        return node.args[0]
    names = ("input", *(name for name, meaning in SYNONYMS.items() if meaning == "input"))
    return next((node.kwargs[name] for name in names if name in node.kwargs), None)


def place_of(node: fx.Node, value: fx.Node) -> str:
    """The one argument that a value is given as; "" if it is none, several, or inside of a list."""
    places = [name for name, given in bind(node).items() if given is value]
    return places[0] if len(places) == 1 else ""
