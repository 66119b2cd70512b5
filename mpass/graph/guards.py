"""The live modules behind a graph being compiled, and guards on what the backend read from them.

Dynamo's guards are built after the backend returns, so a backend that looks at more than the graph
(a layer's number, a model's folder) can still say what its result depends on: without such a guard
one layer's graph would serve all layers. The live modules come from Dynamo's private tracing state,
read in `root_locals` alone; where it is not there (torch.export, a graph made by hand) nothing is
known about them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import fx, nn

LAYER_ATTRIBUTES = ("layer_idx", "layer_index", "layer_id", "layer_number")
"""Where models keep a layer's number, counted from 0."""


@dataclass(frozen=True, eq=False)
class LiveModule:
    """A module of the model being compiled, and Dynamo's Source for it (for guards)."""

    module: nn.Module
    source: Any


def root_locals() -> Mapping[str, Any]:
    """Local variables of the outermost frame being compiled; empty outside of Dynamo."""
    try:
        from torch._dynamo.symbolic_convert import InstructionTranslator

        found: Mapping[str, Any] = InstructionTranslator.current_tx().output.root_tx.f_locals
        return found
    except (ImportError, AttributeError):
        return {}


def root_module() -> LiveModule | None:
    """The module whose forward is compiled: `self` of the outermost frame."""
    return live_module("L['self']")


def live_module(path: str, node: fx.Node | None = None) -> LiveModule | None:
    """The module at one of Dynamo's paths, as `L['self'].model.layers.3.self_attn`.

    node: if given, the module must be one that the node was traced in.
    """
    from torch._dynamo.source import AttrSource, DictGetItemSource, LocalSource

    match = re.match(r"L\['(\w+)'\]", path)
    module = root_locals().get(match[1]) if match else None
    if match is None or not isinstance(module, nn.Module):
        return None
    source: Any = LocalSource(match[1])
    rest = re.sub(r"_modules\['([^']*)'\]|\['?([^'\]]*)'?\]", r".\1\2", path[match.end() :])
    for part in filter(None, rest.split(".")):
        child = module._modules.get(part)
        if child is None:
            return None
        source = DictGetItemSource(AttrSource(source, "_modules"), part)
        module = child
    stack = node.meta.get("nn_module_stack") or {} if node is not None else {}
    if node is not None and str(id(module)) not in stack:
        return None
    return LiveModule(module, source)


def live_stack(node: fx.Node) -> list[LiveModule]:
    """The live modules that a node was traced in, outermost first, the compiled one included."""
    root = root_module()
    paths = [str(entry[0]) for entry in (node.meta.get("nn_module_stack") or {}).values()]
    found = [live_module(path, node) for path in paths]
    return [live for live in (root, *found) if live is not None]


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
