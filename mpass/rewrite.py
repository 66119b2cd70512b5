"""Plans -> an edited graph. Finished or untouched: a graph is never left half rewritten.

A site becomes one estimation op per pattern among its heads, a join where there are several, and
one sparse attention. Masks and repeated kv heads that nothing else reads are dropped.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import fx

from mpass.lowering.index import join_slots
from mpass.patterns.base import Pattern, head_slots, index_op
from mpass.plan import AttentionPlan
from mpass.site import Length, shape_of


def rewrite_attention(gm: fx.GraphModule, plans: Sequence[AttentionPlan]) -> None:
    """Replace every planned site of `gm` in place, drop what died, and check the graph."""
    for plan in plans:
        replace_site(gm.graph, plan)
    if plans:
        remove_dead(gm.graph)
        gm.graph.lint()
        gm.recompile()


def replace_site(graph: fx.Graph, plan: AttentionPlan) -> None:
    """Insert the ops of one plan at the site's output and hand its uses over."""
    site, mask = plan.site, plan.site.mask
    if mask is None:
        raise AssertionError(f"site {site.path or site.output.name} was planned without a mask")
    ops = torch.ops.minference
    with graph.inserting_before(site.output):
        offset = as_argument(graph, mask.query_offset, site.query)
        visible = (mask.key_mask, offset, mask.window, mask.causal)
        index, slots = insert_index(graph, plan, visible)
        output = graph.call_function(
            ops.sparse_attention.default,
            (
                site.query,
                site.key,
                site.value,
                *index,
                list(slots),
                mask.key_mask,
                site.sinks,
                offset,
                mask.window,
                mask.causal,
                site.scale,
                site.softcap,
                plan.dense_above,
                plan.min_seq_len,
                site.layer,
            ),
        )
        created = [output]
        if site.output_transposed:
            output = graph.call_method("transpose", (output, 1, 2))
            created.append(output)
    for node in created:
        copy_meta(site.output, node)
    site.output.replace_all_uses_with(output)


def insert_index(
    graph: fx.Graph, plan: AttentionPlan, visible: tuple[fx.Node | None, int | fx.Node, int, bool]
) -> tuple[list[fx.Node], tuple[int, ...]]:
    """Estimation ops for the patterns of a plan; the index's six nodes and its head_slots."""
    site = plan.site
    groups: dict[type[Pattern], list[int]] = {}
    for head, pattern in enumerate(plan.patterns):
        groups.setdefault(type(pattern), []).append(head)
    key_mask, offset, window, causal = visible
    parts: list[fx.Node] = []
    for cls, heads in groups.items():
        fields = plan.patterns[heads[0]].parameters()
        parameters = [[plan.patterns[head].parameters()[name] for head in heads] for name in fields]
        arguments = (site.query, site.key, key_mask, heads, offset, window, causal, site.scale)
        estimate = graph.call_function(index_op(cls), (*arguments, *parameters))
        copy_meta(site.output, estimate)
        parts += unpack(graph, estimate, site.output)
    slots = [head_slots(cls, len(heads)) for cls, heads in groups.items()]
    if len(groups) == 1:
        return parts, slots[0]
    flat_slots = [slot for part in slots for slot in part]
    flat_heads = [head for heads in groups.values() for head in heads]
    sizes = [len(heads) for heads in groups.values()]
    joined = graph.call_function(
        torch.ops.minference.join_indexes.default, (parts, flat_slots, flat_heads, sizes)
    )
    copy_meta(site.output, joined)
    return unpack(graph, joined, site.output), join_slots(slots, list(groups.values()))


def unpack(graph: fx.Graph, node: fx.Node, origin: fx.Node) -> list[fx.Node]:
    """The six tensors of an index from the op that returns them."""
    items = [graph.call_function(operator.getitem, (node, i)) for i in range(6)]
    for item in items:
        copy_meta(origin, item)
    return items


def copy_meta(origin: fx.Node, node: fx.Node) -> None:
    """Keep where a node comes from (module stack, stack trace), not what its value was."""
    for key in ("nn_module_stack", "stack_trace", "source_fn_stack", "custom", "seq_nr"):
        if key in origin.meta:
            node.meta[key] = origin.meta[key]


def as_argument(graph: fx.Graph, length: Length | fx.Node, query: fx.Node) -> int | fx.Node:
    """A length as an op's argument: the int, or a node that computes the SymInt."""
    if not isinstance(length, torch.SymInt):
        return length
    found = find_symint(graph, length)
    if found is None:
        raise LookupError(f"no node of the graph holds the length {length}")
    return found


def find_symint(graph: fx.Graph, length: torch.SymInt) -> fx.Node | None:
    """A node whose value is this SymInt."""
    for node in graph.nodes:
        value = node.meta.get("example_value", node.meta.get("val"))
        if isinstance(value, torch.SymInt) and value.node.expr == length.node.expr:
            found: fx.Node = node
            return found
    return None


def remove_dead(graph: fx.Graph) -> None:
    """Drop nodes without users and without effects; mutations stay."""
    graph.eliminate_dead_code()


__all__ = ["rewrite_attention", "shape_of"]
