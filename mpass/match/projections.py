"""Multi-head attention with its projections, in the ops that PyTorch computes it by.

The functions are plain torch over proxies. They say what `F.multi_head_attention_forward` does
without weights, and what the two ops of torch's fast path do, whose masks tell what is hidden.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.nn import functional as F

from mpass.graph.nodes import example, shape_of, value_of

OPS: dict[Any, str] = {
    F.multi_head_attention_forward: "nn.MultiheadAttention",
    torch._native_multi_head_attention: "nn.MultiheadAttention's fast path",
    torch._transformer_encoder_layer_fwd: "nn.TransformerEncoderLayer's fast path",
}
"""The ops that project inside, and what they are called in messages."""

PADDING = 1
"""The mask_type of a key padding mask [B, S]; the others are of masks [.., L, S]."""

ROWS_SEE_KEYS = "minference_rows_see_keys"
"""Key of the meta of an attention that is that of a call only if every row sees a key: its name."""

NATIVE_DEFAULTS: dict[str, Any] = {"mask": None, "mask_type": None}


@dataclass(frozen=True)
class Parts:
    """A call in parts: the node of its attention, and the node of what the call gives."""

    attention: fx.Node
    result: fx.Node


@dataclass(frozen=True)
class Layout:
    """Where the batch stands in the output: [B, L, E], or else [L, B, E]."""

    heads: int
    batch_first: bool

    def split(self, x: Any) -> Any:
        """[B, L, E] -> [B, H, L, D]."""
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

    def join(self, x: Any) -> Any:
        """[B, H, L, D] -> [.., E]."""
        order = (0, 2, 1, 3) if self.batch_first else (2, 0, 1, 3)
        return x.permute(*order).flatten(2)


def defaults_of(target: Any) -> dict[str, Any]:
    """The values of arguments that a call need not give, under the names of `bind`."""
    if not isinstance(target, types.FunctionType):
        native = target is torch._native_multi_head_attention
        return NATIVE_DEFAULTS | ({"need_weights": True} if native else {})
    parameters = inspect.signature(target).parameters.values()
    given = {p.name: p.default for p in parameters if p.default is not p.empty}
    return {("train" if name == "training" else name): value for name, value in given.items()}


def write_parts(call: fx.Node, arguments: dict[str, Any]) -> Parts:
    """Write a call out before it. The new nodes have no values and no origin yet."""
    tracer = fx.proxy.GraphAppendingTracer(call.graph)
    given = {name: as_proxy(value, tracer) for name, value in arguments.items()}
    with call.graph.inserting_before(call):
        attention, result = WRITERS[call.target](given, arguments)
    return Parts(attention.node, result.node)


def as_proxy(value: Any, tracer: fx.proxy.TracerBase) -> Any:
    return fx.Proxy(value, tracer) if isinstance(value, fx.Node) else value


def functional_parts(a: dict[str, Any], nodes: dict[str, Any]) -> tuple[Any, Any]:
    """`F.multi_head_attention_forward(need_weights=False)`: its attention and its output."""
    batched = len(shape_of(nodes["query"])) == 3
    names = ("query", "key", "value")
    inputs = [a[name].transpose(0, 1) if batched else a[name].unsqueeze(0) for name in names]
    weights, biases = projections(a)
    same = nodes["query"] is nodes["key"] is nodes["value"]
    layout = Layout(a["num_heads"], batch_first=False)
    if same and not a["use_separate_proj_weight"]:
        query, key, value = packed(inputs[0], a["in_proj_weight"], a["in_proj_bias"])
    else:
        query, key, value = map(F.linear, inputs, weights, biases)
    hint = bool(a["is_causal"]) and a["key_padding_mask"] is None
    mask = None if hint else functional_mask(a, nodes)
    query, key, value = map(layout.split, (query, key, value))
    attention = F.scaled_dot_product_attention(query, key, value, mask, is_causal=hint)
    result = F.linear(layout.join(attention), a["out_proj_weight"], a["out_proj_bias"])
    return attention, result if batched else result.squeeze(1)


def packed(x: Any, weight: Any, bias: Any) -> list[Any]:
    """Query, key and value of one input, by one product."""
    return thirds(F.linear(x, weight, bias), -1)


def projections(a: dict[str, Any]) -> tuple[list[Any], list[Any]]:
    """Weights and biases of query, key and value."""
    bias = a["in_proj_bias"]
    biases = [None] * 3 if bias is None else thirds(bias)
    if a["use_separate_proj_weight"]:
        return [a["q_proj_weight"], a["k_proj_weight"], a["v_proj_weight"]], biases
    return thirds(a["in_proj_weight"]), biases


def thirds(x: Any, dim: int = 0) -> list[Any]:
    """The parts of query, key and value in what is packed."""
    parts = x.chunk(3, dim)
    return [parts[i] for i in range(3)]


def functional_mask(a: dict[str, Any], nodes: dict[str, Any]) -> Any:
    """attn_mask [L, S] or [B * H, L, S] with key_padding_mask [B, S] or [S], as SDPA takes a mask.

    A true cell of theirs hides; one of SDPA's shows.
    """
    mask, padding = a["attn_mask"], a["key_padding_mask"]
    dtypes = [example(nodes[n]).dtype for n in MASKS if nodes[n] is not None]
    if mask is not None and len(shape_of(nodes["attn_mask"])) == 3:
        mask = mask.unflatten(0, (-1, a["num_heads"]))
    if padding is not None and len(shape_of(nodes["key_padding_mask"])) == 1:
        padding = padding.unsqueeze(0)
    if padding is not None:
        padding = padding.unsqueeze(1).unsqueeze(2)
    if mask is None or padding is None:
        only = padding if mask is None else mask
        return ~only if dtypes == [torch.bool] else only
    if set(dtypes) == {torch.bool}:
        return ~(mask | padding)
    added = [
        as_added(one, nodes[name], nodes["query"])
        for one, name in zip((mask, padding), MASKS, strict=True)
    ]
    return added[0] + added[1]


MASKS = ("attn_mask", "key_padding_mask")


def as_added(mask: Any, node: fx.Node, query: fx.Node) -> Any:
    """A mask as it is added to the scores: minus infinity where it hides."""
    if example(node).dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=example(query).dtype).masked_fill(mask, float("-inf"))


def native_parts(a: dict[str, Any], nodes: dict[str, Any]) -> tuple[Any, Any]:
    """`torch._native_multi_head_attention`: its attention and its output, [B, L, E]."""
    name = OPS[torch._native_multi_head_attention]
    if nodes["query"] is nodes["key"] is nodes["value"]:
        inputs = packed(a["query"], a["qkv_weight"], a["qkv_bias"])
    else:
        given = (a["query"], a["key"], a["value"])
        inputs = list(map(F.linear, given, thirds(a["qkv_weight"]), thirds(a["qkv_bias"])))
    return native_attention(inputs, a, nodes, a["num_head"], name)


def native_attention(
    inputs: Any, a: dict[str, Any], nodes: dict[str, Any], heads: int, name: str
) -> tuple[Any, Any]:
    """The attention of the fast path over projected inputs, and its projected output.

    A row that sees no key is NaN in the fast path, and zeros in SDPA. Where the mask is there
    anyway, as padding and what comes from outside of the graph are, such rows are looked for.
    """
    layout = Layout(heads, batch_first=True)
    mask = a["mask"]
    if mask is not None:
        cells = example(nodes["mask"])
        if cells.dim() == 4:  # the layer expands its mask, which is read once and not per head
            for dim in (0, 1):
                mask = mask.narrow(dim, 0, 1) if cells.stride(dim) == 0 else mask
        hidden = mask if cells.dtype == torch.bool else mask != 0
        mask = ~(hidden.unsqueeze(1).unsqueeze(2) if a["mask_type"] == PADDING else hidden)
    query, key, value = map(layout.split, inputs)
    attention: Any = F.scaled_dot_product_attention(query, key, value, mask)
    result = attention
    if mask is not None and (a["mask_type"] == PADDING or is_given(nodes["mask"])):
        result = attention.masked_fill((~mask).all(-1, True), float("nan"))
    elif mask is not None:
        attention.node.meta[ROWS_SEE_KEYS] = name
    return attention, F.linear(layout.join(result), a["proj_weight"], a["proj_bias"])


def is_given(mask: fx.Node) -> bool:
    """Whether a mask is an input of the graph with a cell for each query and key, or made of one.

    Such a mask is never proven, and is in memory whatever becomes of the attention.
    """
    cells = [str(size) for size in example(mask).shape[-2:]]
    pending, seen = [mask], {mask}
    while pending:
        node = pending.pop()
        if node.op in ("placeholder", "get_attr"):
            value = value_of(node)
            if isinstance(value, Tensor) and [str(n) for n in value.shape[-2:]] == cells:
                return True
        new = [before for before in node.all_input_nodes if before not in seen]
        seen.update(new)
        pending += new
    return False


def encoder_parts(a: dict[str, Any], nodes: dict[str, Any]) -> tuple[Any, Any]:
    """`torch._transformer_encoder_layer_fwd`: its attention and its output, [B, L, E]."""

    def norm(x: Any, which: int) -> Any:
        return F.layer_norm(
            x, (a["embed_dim"],), a[f"norm_weight_{which}"], a[f"norm_bias_{which}"], a["eps"]
        )

    name = OPS[torch._transformer_encoder_layer_fwd]
    x = a["src"]
    first = norm(x, 1) if a["norm_first"] else x
    inputs = packed(first, a["qkv_weight"], a["qkv_bias"])
    attention, attended = native_attention(inputs, a, nodes, a["num_heads"], name)
    x = attended + x
    x = x if a["norm_first"] else norm(x, 1)
    inner = norm(x, 2) if a["norm_first"] else x
    inner = F.linear(inner, a["ffn_weight_1"], a["ffn_bias_1"])
    inner = F.gelu(inner) if a["use_gelu"] else F.relu(inner)
    x = F.linear(inner, a["ffn_weight_2"], a["ffn_bias_2"]) + x
    return attention, x if a["norm_first"] else norm(x, 2)


Writer = Callable[[dict[str, Any], dict[str, Any]], tuple[Any, Any]]

WRITERS: dict[Any, Writer] = {
    F.multi_head_attention_forward: functional_parts,
    torch._native_multi_head_attention: native_parts,
    torch._transformer_encoder_layer_fwd: encoder_parts,
}
"""What writes out each op of `OPS`."""
