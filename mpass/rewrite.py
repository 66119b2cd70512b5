"""Plans -> an edited graph. Finished or untouched: a graph is never left half rewritten.

A site becomes one estimation op per pattern among its heads, a join where there are several, and
one sparse attention. Masks and repeated kv heads that nothing else reads are dropped.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence

import sympy
import torch
from torch import fx

from mpass.graph.dead_code import remove_dead
from mpass.graph.nodes import shape_of, value_of
from mpass.graph.site import AttentionSite, Length, MaskMeaning
from mpass.lowering.index import join_slots
from mpass.patterns.base import Pattern, head_slots, index_op, shared_slots
from mpass.plan import AttentionPlan


def rewrite_attention(gm: fx.GraphModule, plans: Sequence[AttentionPlan]) -> None:
    """Replace every planned site of `gm` in place, drop what died, and check the graph."""
    for plan in plans:
        replace_site(gm.graph, plan)
    if plans:
        remove_dead(gm.graph, [plan.site.output for plan in plans])
        gm.graph.lint()
        gm.recompile()


def replace_site(graph: fx.Graph, plan: AttentionPlan) -> None:
    """Insert the ops of one plan at the site's output and hand its uses over."""
    site, mask = plan.site, plan.site.mask
    if mask is None:
        raise AssertionError(f"site {site.path or site.output.name} was planned without a mask")
    with graph.inserting_before(site.output):
        key, value, key_mask = insert_keys(graph, site, mask)
        offset = as_argument(graph, mask.query_offset)
        visible = (key_mask, offset, mask.window, mask.causal)
        index, slots = insert_index(graph, plan, key, visible)
        arguments = (site.query, key, value, *index, list(slots), key_mask, site.sinks)
        output = graph.call_function(
            torch.ops.minference.sparse_attention.default,
            (
                *arguments,
                *visible[1:],
                site.scale,
                site.softcap,
                plan.dense_above,
                plan.min_seq_len,
                site.layer,
            ),
        )
        created = [output, *insert_check(graph, site, output, visible)]
        if site.output_transposed:
            output = graph.call_method("transpose", (output, 1, 2))
            created.append(output)
    for node in created:
        copy_meta(site.output, node)
    site.output.replace_all_uses_with(output)


def insert_check(
    graph: fx.Graph,
    site: AttentionSite,
    output: fx.Node,
    visible: tuple[fx.Node | None, int | fx.Node, int, bool],
) -> list[fx.Node]:
    """The op that holds flex_attention's lists against the mask in each call, where it has some."""
    if site.listed is None:
        return []
    lists = [getattr(site.listed, field.name) for field in dataclasses.fields(site.listed)]
    arguments = (output, site.query, site.key, site.value, *lists, *visible)
    options = (site.scale, site.softcap, site.layer)
    check = torch.ops.minference.check_block_lists.default
    return [graph.call_function(check, (*arguments, *options))]


def insert_keys(
    graph: fx.Graph, site: AttentionSite, mask: MaskMeaning
) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """Key, value and key_mask [B, Nk] of a site, cut to the valid keys (views, no copies)."""
    key, value, key_mask = site.key, site.value, mask.key_mask
    batch = shape_of(site.query)[0]
    if key_mask is not None and shape_of(key_mask)[0] != batch:
        rows = as_argument(graph, batch)
        key_mask = graph.call_method("expand", (key_mask, rows, -1))
        copy_meta(site.output, key_mask)
    if mask.valid_keys is None:
        return key, value, key_mask
    rows_kept = slice(None, as_argument(graph, mask.valid_keys))
    everything = slice(None)

    def cut(node: fx.Node, *where: slice) -> fx.Node:
        shorter = graph.call_function(operator.getitem, (node, where))
        copy_meta(site.output, shorter)
        return shorter

    return (
        cut(key, everything, everything, rows_kept),
        cut(value, everything, everything, rows_kept),
        None if key_mask is None else cut(key_mask, everything, rows_kept),
    )


def insert_index(
    graph: fx.Graph,
    plan: AttentionPlan,
    key: fx.Node,
    visible: tuple[fx.Node | None, int | fx.Node, int, bool],
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
        arguments = (site.query, key, key_mask, heads, offset, window, causal, site.scale)
        limits = (plan.dense_above, plan.min_seq_len)
        estimate = graph.call_function(index_op(cls), (*arguments, *limits, *parameters))
        copy_meta(site.output, estimate)
        parts += unpack(graph, estimate, site.output)
    slots = [head_slots(cls, len(heads)) for cls, heads in groups.items()]
    if len(groups) == 1:
        return parts, shared_slots(plan.patterns, slots[0])
    flat_slots = [slot for part in slots for slot in part]
    flat_heads = [head for heads in groups.values() for head in heads]
    sizes = [len(heads) for heads in groups.values()]
    joined = graph.call_function(
        torch.ops.minference.join_indexes.default, (parts, flat_slots, flat_heads, sizes)
    )
    copy_meta(site.output, joined)
    joined_slots = join_slots(slots, list(groups.values()))
    return unpack(graph, joined, site.output), shared_slots(plan.patterns, joined_slots)


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


def as_argument(graph: fx.Graph, length: Length | fx.Node) -> int | fx.Node:
    """A length as an op's argument: the int, or a node that computes the SymInt.

    The expression is built from the sizes and symbols that the graph's inputs hold.
    """
    if not isinstance(length, torch.SymInt):
        return length
    return build_expression(graph, length.node.expr)


def build_expression(graph: fx.Graph, expression: sympy.Expr) -> int | fx.Node:
    """Nodes that compute a sympy expression over the shape symbols of a graph."""
    if expression.is_Integer:
        return int(expression)
    if expression.is_Symbol:
        return find_symbol(graph, expression)
    fold = {sympy.Add: operator.add, sympy.Mul: operator.mul}.get(expression.func)
    if fold is None:
        raise LookupError(f"no node of the graph holds the length {expression}")
    parts = [build_expression(graph, argument) for argument in expression.args]
    total = parts[0]
    for part in parts[1:]:
        total = graph.call_function(fold, (total, part))
    return total


def find_symbol(graph: fx.Graph, symbol: sympy.Symbol) -> fx.Node:
    """The input that is a shape symbol, or a new node with the size of a tensor input that is."""
    for node in graph.find_nodes(op="placeholder"):
        value = value_of(node)
        if isinstance(value, torch.SymInt) and value.node.expr == symbol:
            return node
        for dim, size in enumerate(value.shape if isinstance(value, torch.Tensor) else ()):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return graph.call_method("size", (node, dim))
    raise LookupError(f"no input of the graph holds the length {symbol}")
