"""flex_attention: the higher-order op, whose mask is a small graph of (b, h, q, k).

The mask's meaning is read from mask_mod. The op also skips the blocks that its BlockMask leaves
out; `create_block_mask` makes these from the same mask_mod, but a BlockMask can be built of other
blocks, so the blocks of the call that is being compiled are counted against the proven meaning.
"""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

from mpass.mask import MaskProof, MaskProver, mask_sizes
from mpass.mask_expr import BATCH, HEAD, KEY, QUERY, Expr
from mpass.mask_reader import op_name
from mpass.match.common import constant_scale, gradient_reason, is_tensor, make_site, shape_reason
from mpass.match.eager import CASTS, FACTORS, constant_factor
from mpass.site import AttentionSite, Length, MaskMeaning, shape_of

BLOCK_COUNTS = (2, 4)
"""Places of kv_num_blocks and full_kv_num_blocks in a BlockMask's tuple."""


def match_flex(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The site of a flex_attention call; None if the node is none."""
    if node.op != "call_function" or node.target is not torch.ops.higher_order.flex_attention:
        return None
    query, key, value, score_mod, block_mask, scale, *_rest = node.args
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
    proof = MaskProof(None, "not read: the site stays dense")
    if not reason:
        proof = prove_blocks(node, block_mask, query, key, prover)
    return make_site(
        output,
        "flex",
        query=query,
        key=key,
        value=value,
        scale=number or 0.0,
        softcap=softcap or 0.0,
        mask=proof.meaning,
        unproven=proof.reason,
        dense_reason=reason,
    )


def result_reason(node: fx.Node) -> str:
    """Why the op's other results keep it dense."""
    for user in node.users:
        if op_name(user) != "getitem" or user.args[1] != 0:
            if user.users:
                return "flex_attention returns its log-sum-exp, which sparse attention does not"
    if sum(op_name(user) == "getitem" and user.args[1] == 0 for user in node.users) != 1:
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
        carried = next((arg for arg in node.args if isinstance(arg, fx.Node)), None)
        if carried is None or node.op == "placeholder":
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
) -> MaskProof:
    """The meaning of a BlockMask: that of its mask_mod, if its blocks are those of it."""
    mask_mod = sub_graph(node, block_mask[-1])
    if mask_mod is None:
        return MaskProof(None, "mask_mod is not in the graph")
    buffers = node.args[8] if len(node.args) > 8 else ()
    placeholders = [item for item in mask_mod.graph.nodes if item.op == "placeholder"]
    arguments: dict[fx.Node, Expr] = dict(
        zip(placeholders, (BATCH, HEAD, QUERY, KEY), strict=False)
    )
    for placeholder, buffer in zip(placeholders[4:], buffers, strict=False):  # type: ignore[arg-type]
        if isinstance(buffer, fx.Node) and is_tensor(buffer):
            arguments[placeholder] = prover.reader.read(buffer, node)
    sizes = mask_sizes(query, key)
    proof = prover.prove_mask_mod(mask_mod.graph, arguments, sizes, key, node)
    if proof.meaning is None:
        return proof
    problem = block_problem(node, block_mask, proof.meaning, query, key, prover)
    return MaskProof(None, problem, proof.condition) if problem else proof


def block_problem(
    node: fx.Node,
    block_mask: Any,
    meaning: MaskMeaning,
    query: fx.Node,
    key: fx.Node,
    prover: MaskProver,
) -> str:
    """Why the blocks of a BlockMask are not those of its mask_mod; "" if they are."""
    if all(block_mask[place] is None for place in BLOCK_COUNTS):
        return ""
    given = [block_mask[place] for place in BLOCK_COUNTS if block_mask[place] is not None]
    counts = [
        count
        for count_node in given
        if (count := block_count(count_node, node, prover)) is not None
    ]
    if len(counts) != len(given):
        return "blocks of the BlockMask are not known when compiling"
    found = torch.stack([count.long() for count in counts]).sum(0)
    num_queries, num_keys = hint(shape_of(query)[2]), hint(shape_of(key)[2])
    rows, columns = int(block_mask[-3]), int(block_mask[-2])
    expected = count_blocks(meaning, num_queries, num_keys, rows, columns)
    if found.shape[-1] != len(expected):
        return "the BlockMask is for another length"
    expected = expected.to(found.device)
    agree = found <= expected if meaning.key_mask is not None else found == expected
    if not bool(agree.all()):
        return "blocks of the BlockMask are not those of its mask_mod"
    return ""


def count_blocks(
    meaning: MaskMeaning, num_queries: int, num_keys: int, rows: int, columns: int
) -> torch.Tensor:
    """Key blocks that each block of `rows` queries sees some key of: int64 [query blocks]."""
    num_rows, num_columns = -(-num_queries // rows), -(-num_keys // columns)
    offset = hint(meaning.query_offset)  # type: ignore[arg-type]
    first = torch.arange(num_rows) * rows + offset
    last = torch.clamp(first + rows, max=num_queries + offset) - 1
    starts = torch.arange(num_columns) * columns
    seen = torch.ones(num_rows, num_columns, dtype=torch.bool)
    if meaning.causal:
        seen &= starts[None] <= last[:, None]
    if meaning.window:
        seen &= starts[None] + columns - 1 > first[:, None] - meaning.window
    if meaning.valid_keys is not None:
        seen &= starts[None] < hint(meaning.valid_keys)
    return seen.sum(-1)


def block_count(count: Any, node: fx.Node, prover: MaskProver) -> torch.Tensor | None:
    """Blocks per block of queries: of the call being compiled, or a constant of the graph."""
    if isinstance(count, fx.Node) and count.op != "placeholder":
        expr = prover.reader.read(count, node)
        if not isinstance(expr, sympy.Integer):
            return None
        return torch.full([hint(size) for size in shape_of(count)], int(expr))
    return real_value(count)


def real_value(node: Any) -> torch.Tensor | None:
    """The tensor that a graph input has in the call that is being compiled."""
    argument = node.meta.get("grapharg") if isinstance(node, fx.Node) else None
    value = getattr(argument, "example", None)
    return value if isinstance(value, torch.Tensor) and not is_fake(value) else None


def is_fake(value: torch.Tensor) -> bool:
    return isinstance(value, torch._subclasses.fake_tensor.FakeTensor)


def hint(length: Length) -> int:
    """A length in the call that is being compiled."""
    if isinstance(length, torch.SymInt):
        value = length.node.hint
        return int(value) if value is not None else int(sympy.Integer(length.node.expr))
    return int(length)
