"""nn.MultiheadAttention and nn.TransformerEncoderLayer: ops that project inside.

Their query, key and value do not exist in the graph. `open_calls` writes such a call out beside it,
as PyTorch computes it, so that the attention in it can be matched; `settle_calls` keeps one of the
two: the parts where their attention became sparse, and else the call, as if nothing had been there.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from mpass.failures import contain
from mpass.graph.arguments import bind, tensor_arguments
from mpass.graph.layouts import difference, same_layout
from mpass.graph.new_nodes import copy_meta, propagate, value_key
from mpass.graph.nodes import MADE_HERE, example, op_name, value_of
from mpass.graph.printing import count_ops
from mpass.graph.site import AttentionSite
from mpass.masks.prover import MaskProver
from mpass.match.common import dropout_reason, gradient_reason, make_site
from mpass.match.projections import OPS, PADDING, ROWS_SEE_KEYS, defaults_of, write_parts
from mpass.match.spelling import Spelling

OP_NAMES = frozenset({function.__name__.strip("_") for function in OPS})

NOT_OPENED = "query, key and value are projected inside of one op"
"""The reason of a call that nobody tried to open: its graph is left alone, or only looked at."""

MASK_TYPES = (0, PADDING, 2)

OPENED = "minference_opened"
"""Key of the meta of a call that stands in parts beside itself."""

SPELLED = "minference_spelled"
"""Key of the meta of an attention that stands for one of another spelling: which."""

KEPT = "minference_kept"
"""Key of the meta of a call that could not be opened: why."""


@dataclass(frozen=True)
class OpenedCall:
    """A call that is written out before it.

    attention: the node of its parts that is an attention, result: the one that has what `outputs`
    have, the nodes whose uses it takes over if the attention becomes sparse.
    """

    call: fx.Node
    attention: fx.Node
    result: fx.Node
    outputs: tuple[fx.Node, ...]
    added: tuple[fx.Node, ...]


def open_calls(graph: fx.Graph) -> list[OpenedCall]:
    """Write out the calls of a graph whose attention may become sparse; nothing reads the parts."""
    opened: list[OpenedCall] = []
    for node in list(graph.nodes):
        if node.op != "call_function" or node.target not in OPS or reason_to_keep(node):
            continue
        before = set(graph.nodes)
        found: OpenedCall | str
        try:
            found = open_call(node)
        except Exception as error:
            owner = graph.owning_module
            found = contain(error, "opening attention", count_ops(owner) if owner else None)
        if isinstance(found, OpenedCall):
            node.meta[OPENED] = True
            opened.append(found)
        else:
            node.meta[KEPT] = found
            erase_all(graph, [added for added in graph.nodes if added not in before])
    return opened


def open_call(call: fx.Node) -> OpenedCall | str:
    """Write out one call before it; why the parts are no replacement, where they are none."""
    arguments = arguments_of(call)
    outputs = outputs_of(call)
    before = set(call.graph.nodes)
    parts = write_parts(call, arguments)
    added = tuple(node for node in call.graph.nodes if node not in before)
    origin = next(tensor_arguments(call))
    parts.attention.meta[SPELLED] = SPELLING.name
    for node in added:
        copy_meta(call, node)
        propagate(node, origin)
    for output in outputs:
        old, new = example(output), example(parts.result)
        reason = difference(old, new)
        if reason or not same_layout(old, new):
            return f"{OPS[call.target]} in parts: {reason or 'another layout'}"
    return OpenedCall(call, parts.attention, parts.result, outputs, added)


def settle_calls(
    graph: fx.Graph, opened: Sequence[OpenedCall], replaced: Collection[fx.Node]
) -> None:
    """Keep the parts of calls whose attention is among the replaced ones, else the calls.

    Of a call that is kept nothing is left but itself.
    """
    stale: list[fx.Node] = []
    for one in opened:
        del one.call.meta[OPENED]
        if one.attention not in replaced:
            stale += one.added
            continue
        for output in one.outputs:
            # The parts' value aliases what the call's did, for those who look at storages.
            one.result.meta[value_key(output)] = value_of(output)
            output.replace_all_uses_with(one.result)
            graph.erase_node(output)
        if one.call not in one.outputs:
            graph.erase_node(one.call)
    if stale:
        unused = [node for node in graph.nodes if MADE_HERE in node.meta]
        erase_all(graph, [*stale, *unused])


def erase_all(graph: fx.Graph, nodes: Collection[fx.Node]) -> None:
    """Erase nodes that nothing but each other uses."""
    wanted = set(nodes)
    for node in reversed(list(graph.nodes)):
        if node in wanted and not node.users:
            graph.erase_node(node)


def arguments_of(call: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, those that are not given included."""
    return defaults_of(call.target) | bind(call)


def outputs_of(call: fx.Node) -> tuple[fx.Node, ...]:
    """The nodes that stand for the attention's output, where it has a tensor or one of several."""
    if not isinstance(value_of(call), (tuple, list)):
        return (call,)
    return tuple(call.users)


def reason_to_keep(call: fx.Node) -> str:
    """Why a call is not written out; "" if it can be."""
    name = OPS[call.target]
    given = arguments_of(call)
    if "need_weights" in given and given["need_weights"] is not False:
        return f"{name} computes its weights: pass need_weights=False"
    if given.get("add_zero_attn"):
        return f"{name} adds a key of zeros: add_zero_attn"
    if given.get("bias_k") is not None or given.get("bias_v") is not None:
        return f"{name} adds a learned key and value: add_bias_kv"
    if given.get("static_k") is not None or given.get("static_v") is not None:
        return f"{name} is given projected keys or values: static_k, static_v"
    if given.get("train") and dropout_reason(given["dropout_p"]):
        return dropout_reason(given["dropout_p"])
    if given.get("mask") is not None and given["mask_type"] not in MASK_TYPES:
        return f"{name} has a mask of no known type"
    for output in outputs_of(call):
        if output is not call and (op_name(output) != "getitem" or output.args[1] != 0):
            return f"{name} gives results that are not unpacked"
        reason = gradient_reason(output)
        if reason:
            return reason
    return str(call.meta.get(KEPT, ""))


def as_spelled(site: AttentionSite, spelling: str) -> AttentionSite:
    """A site under the name of how the user spelled it, dense if it is not what was spelled."""
    meta = site.output.meta
    site = replace(site, spelling=meta.get(SPELLED, spelling))
    if ROWS_SEE_KEYS not in meta or site.dense_reason:
        return site
    if site.mask_tensor is None and (site.mask is None or site.mask.key_mask is None):
        return site
    if site.mask is not None and site.mask.key_mask is None:
        return replace(site, mask_tensor=None)
    advice = "set torch.backends.mha.set_fastpath_enabled(False)"
    reason = f"{meta[ROWS_SEE_KEYS]} makes rows NaN that see no key: {advice}"
    return replace(site, dense_reason=reason)


def match_multi_head_attention(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The dense site of a call that was not written out; None if it was, or the node is none."""
    if node.op != "call_function" or node.target not in OPS or OPENED in node.meta:
        return None
    tensors = list(tensor_arguments(node))
    if not tensors:
        return None
    bound = bind(node)
    query = bound.get("query", bound.get("src", tensors[0]))
    reason = reason_to_keep(node) or NOT_OPENED
    return make_site(
        node,
        query=query,
        key=bound.get("key", query),
        value=bound.get("value", query),
        scale=1.0,
        mask=None,
        unproven=reason,
        dense_reason=reason,
    )


SPELLING = Spelling("mha", match_multi_head_attention, OP_NAMES)
