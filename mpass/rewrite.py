"""Plans -> an edited graph. Finished or untouched: a graph is never left half rewritten.

A site becomes one estimation op per pattern among its heads, a join where there are several, and
one sparse attention. What is put in is propagated on fake tensors and compared with what it
replaces before anything is handed over. Masks and repeated kv heads that nothing else reads are
dropped.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping, Sequence

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensor

import mpass.lowering.dynamic_mask  # noqa: F401  (defines minference::dynamic_mask_attention)
from mpass.failures import contain
from mpass.graph.dead_code import remove_dead
from mpass.graph.fill_nodes import insert_fills
from mpass.graph.layout_nodes import insert_dimensions, insert_layout
from mpass.graph.layouts import difference, is_rearranged, layout_order, same_layout
from mpass.graph.lengths import as_argument
from mpass.graph.new_nodes import Known, copy_meta, nodes_between, propagate, value_key
from mpass.graph.nodes import example, same_size, shape_of, value_of
from mpass.graph.numbers import kept_number, site_number
from mpass.graph.printing import count_ops, without_guards
from mpass.graph.site import AttentionSite, KeptKeys, MaskMeaning
from mpass.graph.tile_nodes import insert_tiles
from mpass.match import OpenedCall, settle_calls
from mpass.patterns.base import group_heads, named_op, patterns_as_text
from mpass.plan import AttentionPlan, Skip

CONTIGUOUS = {"memory_format": torch.contiguous_format}

aten = torch.ops.aten
"""New nodes are calls of registered ops, which exported programs may hold as well."""

Decision = AttentionPlan | Skip


def rewrite_attention(
    gm: fx.GraphModule, decisions: Sequence[Decision], opened: Sequence[OpenedCall] = ()
) -> list[Decision]:
    """Replace every planned site of `gm` in place, drop what died, and check the graph.

    opened: calls whose parts stand in the graph as well; where they hold a planned site the parts
    take the call's place, and else they go.

    Returns the decisions with those plans skipped whose replacement is not what the site computes.
    """
    taken_over: dict[fx.Node, fx.Node] = {}
    known: Known = {}
    final = [replace_planned(gm, decision, taken_over, known) for decision in decisions]
    replaced = [plan.site.output for plan in final if isinstance(plan, AttentionPlan)]
    settle_calls(gm.graph, opened, replaced)
    if replaced:
        remove_dead(gm.graph, replaced)
        gm.graph.lint()
        gm.recompile()
    return final


def reading(site: AttentionSite, taken_over: Mapping[fx.Node, fx.Node]) -> AttentionSite:
    """A site that reads what took the place of attentions before it, writes to that included."""
    query, key, value = (taken_over.get(n, n) for n in (site.query, site.key, site.value))
    bias = None if site.key_bias is None else taken_over.get(site.key_bias, site.key_bias)
    return dataclasses.replace(site, query=query, key=key, value=value, key_bias=bias)


def replace_planned(
    gm: fx.GraphModule, decision: Decision, taken_over: dict[fx.Node, fx.Node], known: Known
) -> Decision:
    """Carry out one plan, if it is one; a Skip if that cannot be done. Then nothing is edited.

    taken_over: what took the place of outputs; this site's is added. known: fake values of calls.
    """
    if not isinstance(decision, AttentionPlan):
        return decision
    output = decision.site.output
    last = output.prev
    try:
        plan = dataclasses.replace(decision, site=reading(decision.site, taken_over))
        reason = replace_site(gm.graph, plan, taken_over, known)
    except Exception as error:
        reason = contain(error, "rewriting attention", count_ops(gm))
    if not reason:
        return decision
    for node in reversed(nodes_between(last, output)):
        if not node.users:
            gm.graph.erase_node(node)
    return Skip(decision.site, reason, decision.config_source)


def replace_site(
    graph: fx.Graph, plan: AttentionPlan, taken_over: dict[fx.Node, fx.Node], known: Known
) -> str:
    """Insert the ops of one plan just before the site's output and hand its uses over.

    Returns why the ops are no replacement; "" if all is done.
    """
    site = plan.site
    last = site.output.prev
    output = insert_site(graph, plan)
    for node in nodes_between(last, site.output):
        propagate(node, site.output, known)
    old, new = example(site.output), value_of(output)
    if not isinstance(old, FakeTensor):
        taken_over[site.output] = output
        site.output.replace_all_uses_with(output)  # A graph of real tensors, made by hand.
        return ""
    if not isinstance(new, torch.Tensor):
        return "the result of sparse attention is not known when compiling"
    if plan.training:  # new nodes are propagated without gradients
        new.requires_grad_()
    reason = difference(old, new)
    if reason:
        return reason
    if not (same_layout(old, new) or is_rearranged(site.output, new)):
        order = layout_order(old)
        if order is None:
            return f"the output has strides {tuple(old.stride())}, which no order of sizes gives"
        output = insert_layout(graph, site.output, output, order)
        new = example(output)
    # A view of the old value: what aliases it keeps doing so for those who look at storages.
    with torch.no_grad(), without_guards(output):
        value = old.as_strided(new.shape, new.stride()).requires_grad_(old.requires_grad)
        output.meta[value_key(site.output)] = value
    taken_over[site.output] = output
    site.output.replace_all_uses_with(output)
    return ""


def insert_site(graph: fx.Graph, plan: AttentionPlan) -> fx.Node:
    """The ops of one plan, before the site's output; the node that has the attention's result."""
    site, mask = plan.site, plan.site.mask
    if site.read_mask is not None:
        return insert_masked(graph, plan, site.read_mask)
    if site.kept is not None:
        return insert_kept(graph, plan, site.kept)
    if mask is None:
        raise AssertionError(f"site {site.path or site.output.name} was planned without a mask")
    with graph.inserting_before(site.output):
        plain = insert_casts(graph, site)
        site = insert_bias(graph, plain)
        plan = dataclasses.replace(plan, site=site)
        key, value, key_mask = insert_keys(graph, site, mask)
        tiled = None
        if plan.grid is not None:
            shared = not plan.training
            tiled = insert_tiles(graph, site, key, value, key_mask, plan.grid, shared=shared)
            site, key, value, key_mask = tiled.site, tiled.key, tiled.value, tiled.key_mask
            plan = dataclasses.replace(plan, site=site)
        offset = as_argument(graph, mask.query_offset)
        visible = (key_mask, offset, mask.window, mask.causal)
        index, slots = insert_index(graph, plan, key, visible)
        sinks = insert_sinks(graph, site)
        arguments = (site.query, key, value, *index, slots, key_mask, sinks)
        output = graph.call_function(
            attention_op(plan),
            (
                *leading_arguments(plan),
                *arguments,
                *visible[1:],
                site.scale,
                site.softcap,
                plan.dense_above,
                plan.min_seq_len,
                site.layer,
                site_number(site, plan.patterns),
                *measured_by(plan),
            ),
            guarded_by(plan),
        )
        if plan.training:
            results, output = output, graph.call_function(operator.getitem, (output, 0))
            copy_meta(site.output, results)
        created = [output, *insert_check(graph, site, output, visible)]
        if sinks is None:  # a sink takes the whole weight of a row without keys
            created += insert_fills(graph, plain, mask, output, key_mask, offset)
        if tiled is not None:
            created += tiled.back(output)
            output = created[-1]
        output = insert_dimensions(graph, site, output)
        created.append(output)
    for node in created:
        copy_meta(site.output, node)
    return output


def attention_op(plan: AttentionPlan) -> torch._ops.OpOverload:
    """The op that a plan puts into the graph; no plan asks for means and for gradients."""
    ops = torch.ops.minference
    name = "sparse_attention"
    if plan.training:
        name = "sparse_attention_train"
    elif plan.summaries:
        name = "sparse_attention_summaries"
    elif plan.kv_select is not None:
        name = "sparse_attention_kv"
    elif plan.denoising:
        name = "sparse_attention_steps"
    op: torch._ops.OpOverload = getattr(ops, name).default
    return op


def leading_arguments(plan: AttentionPlan) -> tuple[int | str, ...]:
    """What an op of `attention_op` takes before all others."""
    if plan.kv_select is not None:
        return dataclasses.astuple(plan.kv_select)
    if plan.denoising:
        return (kept_number(plan.site),)
    return (plan.summaries,) if plan.summaries else ()


def measured_by(plan: AttentionPlan) -> tuple[int, ...]:
    """The argument of an attention that is measured; others do without."""
    return (plan.measured,) if plan.measured else ()


def guarded_by(plan: AttentionPlan) -> dict[str, fx.node.Argument]:
    """The last arguments of an attention: when it is dense, its numbers; others do without."""
    guards: dict[str, fx.node.Argument] = {"causal_only": True} if plan.causal_only else {}
    guards |= {"most_lost": plan.most_lost} if plan.most_lost < 1.0 else {}
    guards |= {"distance_bias": plan.site.distance_bias} if plan.site.distance_bias else {}
    return guards | ({"int8": True} if plan.int8 else {})


def insert_masked(graph: fx.Graph, plan: AttentionPlan, mask: fx.Node) -> fx.Node:
    """Attention under a mask that is read at run time, once for all sites of the graph."""
    site = plan.site
    read_mask = torch.ops.minference.read_mask.default
    with graph.inserting_before(site.output):
        site = insert_bias(graph, insert_casts(graph, site))
        known = graph.find_nodes(op="call_function", target=read_mask)
        read = next((node for node in known if node.args[0] is mask), None)
        if read is None:
            read = graph.call_function(read_mask, (mask,))
            copy_meta(site.output, read)
        form = [graph.call_function(operator.getitem, (read, i)) for i in range(4)]
        output = graph.call_function(
            torch.ops.minference.masked_attention.default,
            (
                *(site.query, site.key, site.value, mask, *form, insert_sinks(graph, site)),
                *(patterns_as_text(plan.patterns), site.scale, site.softcap),
                site.spelling == "eager",
                *(plan.dense_above, plan.min_seq_len, site.layer),
                *measured_by(plan),
            ),
            guarded_by(plan),
        )
        created = [*form, output]
        output = insert_dimensions(graph, site, output)
        created.append(output)
    for node in created:
        copy_meta(site.output, node)
    return output


def insert_kept(graph: fx.Graph, plan: AttentionPlan, kept: KeptKeys) -> fx.Node:
    """Attention to the keys that the model itself chooses for each query."""
    site, mask = plan.site, plan.site.mask
    if mask is None or site.key_bias is None:
        raise AssertionError(f"site {site.path or site.output.name} keeps keys without a bias")
    with graph.inserting_before(site.output):
        site = insert_casts(graph, site)
        key, value, key_mask = insert_keys(graph, site, mask)
        results = graph.call_function(
            torch.ops.minference.dynamic_mask_attention.default,
            (
                *(site.query, key, value, site.key_bias, key_mask, kept.keep, kept.hidden, False),
                *(as_argument(graph, mask.query_offset), site.scale),
            ),
        )
        output = graph.call_function(operator.getitem, (results, 0))
        created = [results, output]
        output = insert_dimensions(graph, site, output)
        created.append(output)
    for node in created:
        copy_meta(site.output, node)
    return output


def insert_casts(graph: fx.Graph, site: AttentionSite) -> AttentionSite:
    """The site with query, key and value as autocast narrows them."""

    def cast(node: fx.Node) -> fx.Node:
        if example(node).dtype == site.compute_dtype:
            return node
        narrow = graph.call_function(aten.to.dtype, (node, site.compute_dtype))
        copy_meta(site.output, narrow)
        propagate(narrow, site.output)
        return narrow

    query, key, value = map(cast, (site.query, site.key, site.value))
    return dataclasses.replace(site, query=query, key=key, value=value)


def insert_bias(graph: fx.Graph, site: AttentionSite) -> AttentionSite:
    """The site with its bias per key in more channels of query and key, as kernels read it."""
    if site.key_bias is None:
        return site
    numbers = (site.bias_factor, site.scale, site.sinks is None)
    arguments = (site.query, site.key, site.key_bias, *numbers)
    wider = graph.call_function(torch.ops.minference.with_key_bias.default, arguments)
    pair = [graph.call_function(operator.getitem, (wider, place)) for place in range(2)]
    for node in (wider, *pair):
        copy_meta(site.output, node)
        propagate(node, site.output)
    return dataclasses.replace(site, query=pair[0], key=pair[1], key_bias=None)


def insert_sinks(graph: fx.Graph, site: AttentionSite) -> fx.Node | None:
    """The sinks as the kernels read them: one number per head, one after the other."""
    sinks = site.sinks
    if sinks is None:
        return None
    if site.num_heads == 1 or same_size(example(sinks).stride(0), 1):
        return sinks
    node = graph.call_function(aten.clone.default, (sinks,), dict(CONTIGUOUS))
    copy_meta(site.output, node)
    return node


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
        key_mask = graph.call_function(aten.expand.default, (key_mask, [rows, -1]))
        copy_meta(site.output, key_mask)
    if mask.valid_keys is None:
        return key, value, key_mask
    kept = as_argument(graph, mask.valid_keys)

    def cut(node: fx.Node, dim: int) -> fx.Node:
        shorter = graph.call_function(aten.slice.Tensor, (node, dim, 0, kept))
        copy_meta(site.output, shorter)
        return shorter

    return cut(key, 2), cut(value, 2), None if key_mask is None else cut(key_mask, 1)


def insert_index(
    graph: fx.Graph,
    plan: AttentionPlan,
    key: fx.Node,
    visible: tuple[fx.Node | None, int | fx.Node, int, bool],
) -> tuple[list[fx.Node], list[int]]:
    """Estimation ops for the patterns of a plan; the index's six nodes and its head_slots."""
    site = plan.site
    heads = group_heads(plan.patterns, site.num_heads // site.num_kv_heads)
    key_mask, offset, window, causal = visible
    parts: list[fx.Node] = []
    for group in heads.groups:
        arguments = (site.query, key, key_mask, group.heads, offset, window, causal, site.scale)
        limits = (plan.dense_above, plan.min_seq_len)
        number = site_number(site, plan.patterns)
        bias = (site.distance_bias,) if site.distance_bias else ()
        given = (*arguments, *limits, *group.parameters, number, *bias)
        estimate = graph.call_function(named_op(group.name), given)
        copy_meta(site.output, estimate)
        parts += unpack(graph, estimate, site.output)
    if len(heads.groups) == 1:
        return parts, heads.slots
    joined = graph.call_function(
        torch.ops.minference.join_indexes.default,
        (parts, heads.flat_slots, heads.flat_heads, heads.sizes),
    )
    copy_meta(site.output, joined)
    return unpack(graph, joined, site.output), heads.slots


def unpack(graph: fx.Graph, node: fx.Node, origin: fx.Node) -> list[fx.Node]:
    """The six tensors of an index from the op that returns them."""
    items = [graph.call_function(operator.getitem, (node, i)) for i in range(6)]
    for item in items:
        copy_meta(origin, item)
    return items
