"""What one node of a captured graph stands for, calls, and comes from.

Nothing here edits a graph or adds a guard to its shapes.
"""

from __future__ import annotations

import builtins
import functools
import math
import operator
import os
import re
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.fx.experimental.symbolic_shapes import statically_known_true

from mpass.graph.frames import receiver

TORCH = os.path.dirname(torch.__file__) + os.sep
"""Where torch's own Python files lie."""

SHARED_FILES = os.path.join("transformers", "integrations", "")
"""Part of the path of files that models of transformers share: they tell no model from another."""

MADE_HERE = "minference_made"
"""Key of the meta of nodes that the backend made, and may remove again."""

INPLACE_NAMES = {
    "iadd": "add",
    "isub": "sub",
    "imul": "mul",
    "itruediv": "truediv",
    "ifloordiv": "floordiv",
    "imod": "mod",
    "iand": "and",
    "ior": "or",
    "ixor": "xor",
}
"""Operators' names that an assignment like `x += y` has, and those of the ops they stand for."""


HOOKS = re.compile(r"(\.forward|\._old_forward|\.__closure__\[\d+\]\.cell_contents)*\.__self__\b")
"""What paths of modules go through where hooks wrap their forward; users know no such names."""


def value_of(node: fx.Node) -> Any:
    """The value that a node has while compiling (a fake tensor, a size), or None if none is known.

    Dynamo keeps it as "example_value", an exported graph as "val".
    """
    return node.meta.get("example_value", node.meta.get("val"))


def example(node: fx.Node) -> torch.Tensor:
    """The fake tensor that a node stands for, from Dynamo's graph or an exported one."""
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node {node.name} has no example tensor")
    return value


def shape_of(node: fx.Node) -> torch.Size:
    """Shape of the tensor that a node stands for."""
    return example(node).shape


def head_count(node: fx.Node) -> int:
    """Heads of a tensor [.., H, N, D]; 1 if it has none (such a site stays dense)."""
    shape = shape_of(node)
    return number_now(shape[-3]) if len(shape) >= 3 else 1


def number_now(size: int | torch.SymInt) -> int:
    """The size in the call that is compiled, -1 if only running tells; asks without a guard."""
    if not isinstance(size, torch.SymInt):
        return size
    hint = size.node.hint
    return int(hint) if isinstance(hint, int) else -1


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in: `model.layers.3.self_attn`.

    Empty when the compiled module is itself the attention's owner.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['self'\]\.?|^L__self___", "", path.removeprefix(receiver()))
    path = re.sub(r"^L\['(\w+)'\]", r"\1", path)
    path = HOOKS.sub("", path)
    path = re.sub(r"_modules\['([^']*)'\]", r"\1", path)
    return re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path).strip(".")


def given_name(node: fx.Node) -> str:
    """An input of a graph as the user knows it: `bias` of a buffer `L['self']._buffers['bias']`."""
    source = getattr(node.meta.get("grapharg"), "source", None)
    name = getattr(source, "name", "")
    name = name() if callable(name) else name
    if not isinstance(name, str) or not name:
        return node.name
    name = re.sub(r"^L\['(\w+)'\]", r"\1", name)
    name = re.sub(r"\._(?:buffers|modules|parameters)\['(\w+)'\]", r".\1", name)
    return re.sub(r"\._modules\['(\d+)'\]", r".\1", name)


def layer_index(path: str) -> int:
    """Layer number that a module path names: its first integer component, or -1.

    T5's `encoder.block.3.layer.0.SelfAttention` has two; the block is the first.
    """
    for part in path.split("."):
        if part.isdecimal():
            return int(part)
    return -1


def stack_frames(node: fx.Node) -> list[tuple[str, str, str]]:
    """File, line and function of each frame that a node was traced in, outermost first."""
    trace = node.meta.get("stack_trace") or ""
    return re.findall(r'File "(.*)", line (\d+), in (\S+)', trace)


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's model that a node came from: `file:line, in name`.

    Lines inside of torch (flex_attention is one of its Python functions) say nothing to a user, nor
    does the one file through which every model of transformers calls attention.
    """
    frames = stack_frames(node)
    own = [frame for frame in frames if not frame[0].startswith(TORCH)] or frames
    own = [frame for frame in own if SHARED_FILES not in frame[0]] or own
    return "{}:{}, in {}".format(*own[-1]) if own else ""


def same_size(left: int | torch.SymInt, right: int | torch.SymInt) -> bool:
    """Whether two sizes are equal for every length; asks without adding a guard."""
    return bool(statically_known_true(left == right))


def is_tensor(node: object) -> bool:
    """Whether a graph argument is a node that stands for a tensor."""
    return isinstance(node, fx.Node) and isinstance(value_of(node), torch.Tensor)


TORCH_NAMESPACES = (
    torch,
    torch.nn.functional,
    torch.Tensor,
    operator,
    torch._C._nn,
    builtins,
    math,
    torch.special,
    torch.linalg,
    torch.fft,
)
"""Where the functions live that mean what their names say."""

OPERATOR_NAMESPACES = ("aten", "prims", "minference")
"""Those of registered ops; the prims of a name mean what the torch function of the name does."""


@functools.lru_cache(maxsize=4096)
def is_torch_function(target: Any) -> bool:
    """Whether a callable is one of torch's functions or Python's operators, by identity."""
    name = getattr(target, "__name__", "")
    found = (getattr(place, name, None) for place in TORCH_NAMESPACES) if name else ()
    return any(function is not None and function == target for function in found)


def op_name(node: fx.Node) -> str:
    """Name of an op, the same for a function, a method, an in-place method and an aten op.

    A function that is neither torch's nor Python's has its full name, with dots: a custom op `add`
    is no addition.
    """
    if node.op == "call_function":
        if node.target is getattr:
            return str(node.args[1]).strip("_")
        return function_name(node.target)
    return plain_name(str(node.target)) if node.op == "call_method" else node.op


@functools.lru_cache(maxsize=4096)
def function_name(target: Any) -> str:
    """The name of a call's function as `op_name` gives it."""
    if isinstance(target, (OpOverload, OpOverloadPacket)):
        packet = target.overloadpacket if isinstance(target, OpOverload) else target
        namespace = packet._qualified_op_name.partition("::")[0]
        name = packet.__name__
        if namespace not in OPERATOR_NAMESPACES:
            return f"{namespace}.{name}"
        return plain_name(name)
    name = getattr(target, "__name__", str(target))
    if isinstance(target, HigherOrderOperator) or is_torch_function(target):
        return plain_name(name)
    return f"{getattr(target, '__module__', None) or 'function'}.{name}"


def plain_name(name: str) -> str:
    """A name without the marks of an in-place or private op."""
    inplace = INPLACE_NAMES.get(name)
    return name.strip("_") if inplace is None else inplace
