"""Attention inside sub-graphs: activation checkpointing, torch.compiler.nested_compile_region.

A sub-graph may be shared by all layers, but each layer has its own config, so a call whose
sub-graph holds attention is inlined: every call then has nodes of its own. Under gradients
checkpointing has a purpose: these calls are left alone, unless attention is to be trained sparse.
Then the inlined nodes carry the tags that torch's own tracing of a checkpoint gives them, so that
the partitioner recomputes them in the backward pass.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
from torch import fx
from torch._higher_order_ops import wrap
from torch.utils.checkpoint import CheckpointPolicy

from mpass.graph.arguments import argument
from mpass.graph.call_keys import nodes_in
from mpass.graph.dead_code import remove_dead
from mpass.graph.nodes import module_path, op_name, value_of
from mpass.graph.writes import SAME_MEMORY, StorageWrites, written_by
from mpass.match.common import RECORDED, trains
from mpass.match.spellings import SPELLINGS

RECOMPUTE_TAGS = ("recompute", "ac_graph_id")
"""Meta of nodes that a checkpoint recomputes, and of which checkpoint they are."""

CALLS = (
    torch.ops.higher_order.tag_activation_checkpoint,
    torch.ops.higher_order.invoke_subgraph,
)


def inline_subgraphs(gm: fx.GraphModule) -> int:
    """Inline the calls of sub-graphs that hold attention; how many. Nested calls too."""
    inlined = 0
    calls = [node for node in gm.graph.nodes if called_graph(node) is not None]
    if not calls:
        return 0
    writes = StorageWrites(gm.graph)
    names = Counter((str(node.args[0].target), module_path(node)) for node in calls)
    replaced: list[fx.Node] = []
    for node in calls:
        if not reason_to_keep(node, writes):
            shared = names[str(node.args[0].target), module_path(node)] > 1
            body = node.args[0]
            inline_call(gm, node, named=not shared)
            replaced.append(body)
            inlined += 1
    if not inlined:
        return 0
    remove_dead(gm.graph, dict.fromkeys(replaced))
    gm.graph.lint()
    gm.recompile()
    return inlined + inline_subgraphs(gm)


def called_graph(node: fx.Node) -> fx.GraphModule | None:
    """The sub-graph that a node calls, if it is one of those that can be inlined.

    These ops take the sub-graph and its arguments by place; by keyword, settings and no nodes.
    """
    if node.op != "call_function" or node.target not in CALLS or not node.args:
        return None
    if any(True for _ in nodes_in(node.kwargs)):
        return None
    owner, attribute = node.graph.owning_module, node.args[0]
    if owner is None or not isinstance(attribute, fx.Node) or attribute.op != "get_attr":
        return None
    module = getattr(owner, str(attribute.target), None)
    return module if isinstance(module, fx.GraphModule) else None


def reason_to_keep(node: fx.Node, writes: StorageWrites) -> str:
    """Why a call of a sub-graph is not inlined; "" if it is."""
    module = called_graph(node)
    if module is None or not holds_attention(module):
        return "no attention inside"
    values = [value_of(user) for user in node.users]
    if any(isinstance(value, torch.Tensor) and value.requires_grad for value in values):
        if not trains():
            return RECORDED
        if "_checkpoint_context_fn" in module.meta:
            return "a checkpoint with a context_fn chooses itself what is recomputed"
    if any(written_by(inner) for inner in module.graph.nodes):
        return "the sub-graph writes in place"
    if any(writes.ever_written(argument) for argument in node.all_input_nodes):
        return "an argument of the sub-graph is written in place"
    if any(op_name(user) != "getitem" for user in node.users):
        return "the sub-graph's results are not unpacked"
    return ""


def holds_attention(module: fx.GraphModule) -> bool:
    """Whether a graph or one that it calls has an op that attention is matched at."""
    for node in module.graph.nodes:
        if any(spelling.starts_at(node) for spelling in SPELLINGS):
            return True
        inner = called_graph(node)
        if inner is not None and holds_attention(inner):
            return True
    return False


def inline_call(gm: fx.GraphModule, call: fx.Node, named: bool = True) -> None:
    """Replace a call by copies of its sub-graph's nodes.

    named: whether the sub-graph's module paths, which are those of its first call, can be moved to
    this one. They cannot if several calls of one sub-graph come from the same module.
    """
    module = called_graph(call)
    assert module is not None
    first = 2 if call.target is torch.ops.higher_order.invoke_subgraph else 1
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    values: dict[fx.Node, Any] = dict(zip(placeholders, call.args[first:], strict=True))
    output = next(node for node in reversed(module.graph.nodes) if node.op == "output")
    first_call = frozenset(output.meta.get("custom") or ())
    tags = recompute_tags(call)
    with gm.graph.inserting_before(call):
        for node in module.graph.nodes:
            if node.op in ("placeholder", "output"):
                continue
            copied = gm.graph.node_copy(node, lambda old: values[old])
            if node.op == "get_attr":
                copied.target = share_attribute(gm, module, str(node.target))
            move_module_stack(copied, call, named)
            copied.meta.update(tags)
            if call.target is torch.ops.higher_order.invoke_subgraph:
                move_annotations(copied, call, first_call)
            values[node] = copied
    results: Any = fx.map_arg(output.args[0], lambda old: values[old])
    for user in list(call.users):
        assert user.target is operator.getitem
        result = results[argument(user, "index")]
        if isinstance(result, fx.Node):
            result.meta.setdefault(SAME_MEMORY, []).append(value_of(user))
        user.replace_all_uses_with(result)
        gm.graph.erase_node(user)
    gm.graph.erase_node(call)


def recompute_tags(call: fx.Node) -> dict[str, Any]:
    """What nodes of a checkpoint are told apart by, as torch's own tracing of one does it.

    A node that a nested call brings keeps the tags of its own checkpoint.
    """
    if call.target is not torch.ops.higher_order.tag_activation_checkpoint:
        return {key: call.meta[key] for key in RECOMPUTE_TAGS if key in call.meta}
    values = (CheckpointPolicy.PREFER_RECOMPUTE, next(wrap.uid))
    return dict(zip(RECOMPUTE_TAGS, values, strict=True))


def share_attribute(gm: fx.GraphModule, module: fx.GraphModule, name: str) -> str:
    """Make an attribute of a sub-graph one of the graph; the name that it has there."""
    value = module
    for part in name.split("."):
        value = getattr(value, part)
    flat = name.replace(".", "_")
    shared, count = flat, 0
    while hasattr(gm, shared) and getattr(gm, shared) is not value:
        count += 1
        shared = f"{flat}_{count}"
    setattr(gm, shared, value)
    return shared


def move_annotations(node: fx.Node, call: fx.Node, first_call: Collection[str]) -> None:
    """Give a node the annotations of its call: those of a shared sub-graph are of the first call.

    first_call: the keys of what stands around the first call; its end is there too.
    """
    own = {key: value for key, value in node_annotations(node).items() if key not in first_call}
    node.meta["custom"] = {**node_annotations(call), **own}


def node_annotations(node: fx.Node) -> dict[str, Any]:
    return dict(node.meta.get("custom") or {})


def move_module_stack(node: fx.Node, call: fx.Node, named: bool) -> None:
    """Say that a node belongs to the module of its call: a shared sub-graph names the first."""
    outer = list((call.meta.get("nn_module_stack") or {}).items())
    inner = list((node.meta.get("nn_module_stack") or {}).items())
    if not named:
        node.meta["nn_module_stack"] = dict(outer)
        return
    if not outer or len(inner) < len(outer):
        return
    depth = len(outer)
    old, new = str(inner[depth - 1][1][0]), str(outer[-1][1][0])
    moved = [
        (f"{key}@{new}" if old != new else key, (str(path).replace(old, new, 1), *rest))
        for key, (path, *rest) in inner[depth:]
    ]
    node.meta["nn_module_stack"] = dict([*outer, *moved])
