"""flex_attention: the higher-order op, whose mask is a small graph of (b, h, q, k).

The mask's meaning is read from mask_mod. The op also skips the blocks that its BlockMask does not
list; `create_block_mask` makes the lists from the same mask_mod, but a BlockMask can be built of
other blocks, and each call may bring another one. So the lists of the call that is being compiled
are held against the proven meaning here, and those of every call by the op `check_block_lists`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import sympy
import torch
from torch import fx

from mpass.graph.arguments import argument, bind
from mpass.graph.nodes import example, is_tensor, op_name, shape_of, value_of
from mpass.graph.site import AttentionSite, Length, ListedBlocks, MaskMeaning
from mpass.graph.sizes import may_guard
from mpass.lowering.block_mask import BlockLists, lists_agree
from mpass.lowering.index import AttentionMask
from mpass.masks.expressions import BATCH, HEAD, KEY, QUERY, Expr
from mpass.masks.prover import MaskProof, MaskProver, mask_sizes
from mpass.match.common import constant_scale, gradient_reason, make_site, shape_reason
from mpass.match.eager_scores import CASTS, FACTORS, FLOATS, constant_factor
from mpass.match.spelling import Spelling

LISTS = slice(2, 6)
"""Places of kv_num_blocks, kv_indices, full_kv_num_blocks, full_kv_indices in a BlockMask."""

UNKNOWN_BLOCKS = "blocks of the BlockMask are not known when compiling"

NEEDED = ("query", "key", "value", "score_mod", "block_mask", "scale")
"""Arguments that every call of the op gives."""


def match_flex_attention(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The site of a flex_attention call; None if the node is none."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.flex_attention:
        return None
    given = bind(node)
    if any(name not in given for name in NEEDED):
        return None
    query, key, value, score_mod, block_mask, scale = (given[name] for name in NEEDED)
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
    output = next((user for user in node.users if op_name(user) == "getitem"), None)
    if output is None or not is_tensor(output):
        return None
    number = constant_scale(scale, query)
    softcap = read_score_mod(sub_graph(node, score_mod))
    reason = (
        shape_reason(query, key, value)
        or ("scale is not a constant" if number is None else "")
        or ("score_mod is neither the identity nor a softcap" if softcap is None else "")
        or result_reason(node)
        or gradient_reason(output)
    )
    proof, listed = MaskProof(None, "not read: the site stays dense"), None
    if not reason:
        proof, listed = prove_blocks(node, block_mask, query, key, prover)
    return make_site(
        output,
        query=query,
        key=key,
        value=value,
        scale=number or 0.0,
        softcap=softcap or 0.0,
        mask=proof.meaning,
        unproven=proof.reason,
        dense_reason=reason,
        listed=listed,
    )


def result_reason(node: fx.Node) -> str:
    """Why the op's other results keep it dense."""
    items = [argument(user, "index") if op_name(user) == "getitem" else None for user in node.users]
    if any(item != 0 and user.users for item, user in zip(items, node.users, strict=True)):
        return "flex_attention returns its log-sum-exp, which sparse attention does not"
    if items.count(0) != 1:
        return "flex_attention's output is unpacked more than once"
    return ""


def sub_graph(node: fx.Node, attribute: Any) -> fx.GraphModule | None:
    """The GraphModule that an argument of a higher-order op names."""
    owner = node.graph.owning_module
    if not isinstance(attribute, fx.Node) or owner is None:
        return None
    module = getattr(owner, str(attribute.target), None)
    return module if isinstance(module, fx.GraphModule) else None


def result_of(graph: fx.Graph) -> Any:
    """The one value that a graph returns."""
    output = next(node for node in reversed(graph.nodes) if node.op == "output")
    result: Any = output.args[0]
    return result[0] if isinstance(result, (list, tuple)) and len(result) == 1 else result


def read_score_mod(module: fx.GraphModule | None) -> float | None:
    """The softcap of `cap * tanh(score / cap)`, 0 for the identity, None for anything else."""
    if module is None:
        return None
    placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
    node = result_of(module.graph)
    after, before, capped = 1.0, 1.0, False
    while isinstance(node, fx.Node) and node is not placeholders[0]:
        given = (*node.args, *node.kwargs.values())
        carried = next((arg for arg in given if isinstance(arg, fx.Node)), None)
        if carried is None or node.op == "placeholder":
            return None
        if is_tensor(node) and example(node).dtype not in FLOATS:
            return None
        name = op_name(node)
        if name == "tanh" and not capped:
            capped = True
        elif name in FACTORS:
            factor = constant_factor(node, carried)
            if factor is None:
                return None
            after, before = (after, before * factor) if capped else (after * factor, before)
        elif name not in CASTS:
            return None
        node = carried
    if node is not placeholders[0]:
        return None
    if not capped:
        return 0.0 if after == 1.0 else None
    return after if after > 0 and abs(after * before - 1) < 1e-6 else None


def prove_blocks(
    node: fx.Node, block_mask: Any, query: fx.Node, key: fx.Node, prover: MaskProver
) -> tuple[MaskProof, ListedBlocks | None]:
    """The meaning of a BlockMask, that of its mask_mod, and the lists that calls must check."""
    mask_mod = sub_graph(node, block_mask[-1])
    if mask_mod is None:
        return MaskProof(None, "mask_mod is not in the graph"), None
    buffers = argument(node, "mask_mod_other_buffers", ())
    placeholders = [item for item in mask_mod.graph.nodes if item.op == "placeholder"]
    arguments: dict[fx.Node, Expr] = dict(
        zip(placeholders, (BATCH, HEAD, QUERY, KEY), strict=False)
    )
    for placeholder, buffer in zip(placeholders[4:], buffers, strict=False):
        if isinstance(buffer, fx.Node) and is_tensor(buffer):
            arguments[placeholder] = prover.reader.read(buffer, node)
    sizes = mask_sizes(query, key)
    proof = prover.prove_mask_mod(mask_mod.graph, arguments, sizes, key, node)
    if proof.meaning is None:
        return proof, None
    query_block, key_block = block_size(block_mask[-3]), block_size(block_mask[-2])
    if query_block is None or key_block is None:
        return MaskProof(None, UNKNOWN_BLOCKS, proof.condition), None
    counts, entries, full_counts, full_entries = block_mask[LISTS]
    listed = ListedBlocks(counts, entries, full_counts, full_entries, query_block, key_block)
    values = list_values(listed, node, prover)
    problem = block_problem(values, proof.meaning, query, key)
    if problem:
        return MaskProof(None, problem, proof.condition), None
    if is_one_block(listed, node, prover):
        return proof, None
    checked = (
        *proof.meaning.proof,
        "lists of blocks: those of mask_mod here, checked in each call",
    )
    return dataclasses.replace(
        proof, meaning=dataclasses.replace(proof.meaning, proof=checked)
    ), listed


def block_size(size: int | fx.Node) -> int | None:
    """A block size of a BlockMask; None if it is not a number that can be known.

    Dynamo makes a symbol of one that differs from call to call. It is guarded, as Inductor's
    kernels of flex_attention do, so that each size has a graph of its own.
    """
    value = value_of(size) if isinstance(size, fx.Node) else size
    if isinstance(value, torch.SymInt) and not may_guard(value):
        return None
    return int(value)


def block_problem(
    lists: BlockLists | None, meaning: MaskMeaning, query: fx.Node, key: fx.Node
) -> str:
    """Why the lists of the call being compiled are not those of the mask; "" if they are."""
    if lists is None:
        return UNKNOWN_BLOCKS
    if meaning.valid_keys is not None:
        return "a BlockMask over fewer keys than there are is not served"
    num_queries, num_keys = length_now(shape_of(query)[2]), length_now(shape_of(key)[2])
    if lists.kv_num_blocks.shape[-1] != -(-num_queries // lists.query_block):
        return "the BlockMask is for another length"
    offset = meaning.query_offset
    if isinstance(offset, fx.Node):
        return ""  # Stays dense for another reason, which plan_attention gives.
    key_mask = None
    if meaning.key_mask is not None:
        key_mask = real_value(meaning.key_mask)
        if key_mask is None:
            return ""  # Computed in the graph: left to the check in the calls.
    mask = AttentionMask(meaning.causal, length_now(offset), meaning.window, key_mask)
    if not bool(lists_agree(lists, mask, num_queries, num_keys)):
        return "blocks of the BlockMask are not those of its mask_mod"
    return ""


def list_values(listed: ListedBlocks, node: fx.Node, prover: MaskProver) -> BlockLists | None:
    """The lists of the call that is being compiled; None if one of them is not known."""
    nodes = [getattr(listed, field.name) for field in dataclasses.fields(listed)][:4]
    values = [None if item is None else known_value(item, node, prover) for item in nodes]
    if any((item is None) != (value is None) for item, value in zip(nodes, values, strict=True)):
        return None
    counts, entries, full_counts, full_entries = values
    if counts is None or entries is None:
        return None
    return BlockLists(
        counts, entries, full_counts, full_entries, listed.query_block, listed.key_block
    )


def known_value(item: fx.Node, node: fx.Node, prover: MaskProver) -> torch.Tensor | None:
    """A tensor of the call being compiled, or one that the graph fills with a constant."""
    if item.op == "placeholder":
        return real_value(item)
    number = constant_of(item, node, prover)
    return None if number is None else torch.full([length_now(n) for n in shape_of(item)], number)


def constant_of(item: fx.Node, node: fx.Node, prover: MaskProver) -> int | None:
    """The number that every entry of a tensor made in the graph has."""
    expression = prover.reader.read(item, node)
    return int(expression) if isinstance(expression, sympy.Integer) else None


def is_one_block(listed: ListedBlocks, node: fx.Node, prover: MaskProver) -> bool:
    """Whether the lists are constants that name one block for everything, as without BlockMask."""
    nodes = (listed.kv_num_blocks, listed.kv_indices)
    return (
        listed.full_kv_num_blocks is None
        and all(item.op != "placeholder" and shape_of(item)[-1] == 1 for item in nodes)
        and [constant_of(item, node, prover) for item in nodes] == [1, 0]
    )


def real_value(node: Any) -> torch.Tensor | None:
    """The tensor that a graph input has in the call that is being compiled."""
    argument = node.meta.get("grapharg") if isinstance(node, fx.Node) else None
    value = getattr(argument, "example", None)
    return value if isinstance(value, torch.Tensor) and not is_fake(value) else None


def is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.fake_tensor.FakeTensor)


def length_now(length: Length) -> int:
    """A length in the call that is being compiled."""
    if isinstance(length, torch.SymInt):
        value = length.node.hint
        return int(value) if value is not None else int(sympy.Integer(length.node.expr))
    return int(length)


SPELLING = Spelling("flex", match_flex_attention, frozenset({"flex_attention"}))
