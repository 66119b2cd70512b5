"""The live modules behind a graph being compiled, and guards on what the backend read from them.

Dynamo's guards are built after the backend returns, so a backend that looks at more than the graph
(a layer's number, a model's folder) can still say what its result depends on: without such a guard
one layer's graph would serve all layers. The live modules are those of the outermost frame
(frames.py); where there is none (torch.export, a graph made by hand) nothing is known about them.
"""

from __future__ import annotations

import inspect
import re
import types
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

from mpass.graph.frames import receiver, root_locals
from mpass.graph.nodes import stack_frames

LAYER_ATTRIBUTES = ("layer_idx", "layer_index", "layer_id", "layer_number")
"""Where models keep a layer's number, counted from 0."""

WRAPPED = ("_old_forward", "__wrapped__", "__self__", "forward", "func", "args")
"""Attributes through which wrappers of a forward (accelerate's hooks, functools) lead to it."""


@dataclass(frozen=True, eq=False)
class LiveModule:
    """A module of the model being compiled, and Dynamo's Source for it (for guards)."""

    module: nn.Module
    source: Any


def root_module() -> LiveModule | None:
    """The module whose forward is compiled: `self` of the outermost frame."""
    return live_module(receiver())


def live_module(path: str, node: fx.Node | None = None) -> LiveModule | None:
    """The module at one of Dynamo's paths, as `L['self'].model.layers.3.self_attn`.

    A path may lead through attributes that are no modules: hooks that wrap a module's forward keep
    the old one, and the layer is `L['module']._old_forward.__self__` then.
    node: if given, the module must be one that the node was traced in.
    """
    from torch._dynamo.source import AttrSource, DictGetItemSource, GetItemSource, LocalSource

    match = re.match(r"L\['(\w+)'\]", path)
    if match is None or match[1] not in root_locals():
        return None
    value: Any = root_locals()[match[1]]
    source: Any = LocalSource(match[1])
    rest = re.sub(r"_modules\['([^']*)'\]|\['?([^'\]]*)'?\]", r".\1\2", path[match.end() :])
    for part in filter(None, rest.split(".")):
        if isinstance(value, nn.Module) and value._modules.get(part) is not None:
            source = DictGetItemSource(AttrSource(source, "_modules"), part)
            value = value._modules[part]
        elif part.isdecimal() and isinstance(value, (tuple, list)) and int(part) < len(value):
            source, value = GetItemSource(source, int(part)), value[int(part)]
        elif part in WRAPPED:
            source, value = AttrSource(source, part), getattr(value, part, None)
        else:
            return None
    if not isinstance(value, nn.Module):
        return None
    stack = node.meta.get("nn_module_stack") or {} if node is not None else {}
    if node is not None and str(id(value)) not in stack:
        return None
    return LiveModule(value, source)


def live_stack(node: fx.Node) -> list[LiveModule]:
    """The live modules that a node was traced in, outermost first, the compiled one included."""
    root = root_module()
    paths = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    found = [live_module(path, node) for path in paths] or [method_owner(node)]
    return [live for live in (root, *found) if live is not None]


def method_owner(node: fx.Node) -> LiveModule | None:
    """The module whose method a node was traced in, where it was not called as a module.

    A hook calls the forward that it wraps as a plain function, so that no module stack is kept. The
    frame being compiled holds the bound method then, and the node comes from a line of its code.
    """
    from torch._dynamo.source import AttrSource, LocalSource

    lines = {(file, int(line)) for file, line, _ in stack_frames(node)}
    found: dict[int, LiveModule] = {}
    for name, value in root_locals().items():
        owner = getattr(value, "__self__", None)
        if not isinstance(value, types.MethodType) or not isinstance(owner, nn.Module):
            continue
        code = getattr(inspect.unwrap(value.__func__), "__code__", None)
        if code is None:
            continue
        own = {(code.co_filename, line) for *_, line in code.co_lines() if line is not None}
        if own & lines:
            found[id(owner)] = LiveModule(owner, AttrSource(LocalSource(name), "__self__"))
    return next(iter(found.values())) if len(found) == 1 else None


def guard_equal(owner: LiveModule, *attributes: str) -> Any:
    """The value of `owner.a.b`, with a guard that the graph serves only where it is equal."""
    from torch._dynamo.guards import GuardBuilder, install_guard
    from torch._dynamo.source import AttrSource

    value: Any = owner.module
    source = owner.source
    for name in attributes:
        value, source = getattr(value, name), AttrSource(source, name)
    install_guard(source.make_guard(GuardBuilder.EQUALS_MATCH))
    return value


def guarded_layer(node: fx.Node) -> int:
    """The layer number that the innermost module around a node carries, guarded; -1 if none does.

    For regional compilation, where the path does not tell: every layer is `L['self'].self_attn`.
    """
    for live in reversed(live_stack(node)):
        for name in LAYER_ATTRIBUTES:
            number = getattr(live.module, name, None)
            if isinstance(number, int) and not isinstance(number, bool):
                guard_equal(live, name)
                return number
    return -1


def count_layers(node: fx.Node) -> int | None:
    """How many layers the list has that a node's layer is in; None if that cannot be seen."""
    for path in (str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()):
        match = re.match(r"(L\['\w+'\].*?)(?:\.|\[')\d+\b", path)
        container = live_module(match[1]) if match else None
        if container is not None:
            return len(container.module._modules)
    return None
