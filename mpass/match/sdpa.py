"""torch.nn.functional.scaled_dot_product_attention, in torch IR and as the aten op of torch.export.

The one place that knows the signature of SDPA: arguments come positionally or by keyword.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from torch import fx

from mpass.graph.arguments import bind
from mpass.graph.nodes import example, is_tensor, same_size, shape_of
from mpass.graph.site import AttentionSite, MaskMeaning
from mpass.masks.prover import Leading, MaskProver
from mpass.match.common import (
    constant_scale,
    dropout_reason,
    gradient_reason,
    make_site,
    readable_mask,
    shape_reason,
)
from mpass.match.distance_bias import distance_bias, with_distance
from mpass.match.folds import folds_to_four, four_dimensional, leading_sizes, readable
from mpass.match.key_bias import first_row, with_choice, with_words
from mpass.match.masked_bias import bias_behind
from mpass.match.repeat_kv import original_pair
from mpass.match.spelling import Spelling

TARGETS = (
    torch._C._nn.scaled_dot_product_attention,
    torch.ops.aten.scaled_dot_product_attention.default,
)


@dataclass(frozen=True)
class SdpaCall:
    """The arguments of one call, under the names of SDPA's documentation.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv], or all of them [R, N, D] or
    [.., H, N, D]; attn_mask broadcasts to [B, H, Nq, Nk], or to these leading sizes; is_causal is
    aligned to the upper left: query i sees keys 0..i.
    """

    query: fx.Node
    key: fx.Node
    value: fx.Node
    attn_mask: fx.Node | None = None
    dropout_p: object = 0.0
    is_causal: object = False
    scale: object = None
    enable_gqa: object = False


FIELDS = frozenset(field.name for field in dataclasses.fields(SdpaCall))


def bind_sdpa(node: fx.Node) -> SdpaCall | None:
    """The bound arguments of an SDPA call, or None if the node is none."""
    if node.op != "call_function" or node.target not in TARGETS:
        return None
    arguments = bind(node)
    if not {"query", "key", "value"} <= arguments.keys() <= FIELDS:
        return None
    return SdpaCall(**arguments)


def match_sdpa(node: fx.Node, prover: MaskProver) -> AttentionSite | None:
    """The site of an SDPA call, dense or not; None if the node is no SDPA call."""
    call = bind_sdpa(node)
    if call is None or not all(map(is_tensor, (call.query, call.key, call.value))):
        return None
    scale = constant_scale(call.scale, call.query)
    leading = None
    gradients = gradient_reason(node)
    if not gradients and folds_to_four(call.query, call.key, call.value):
        leading = leading_sizes(call.query)
        query, key, value = four_dimensional(call.query, call.key, call.value, node, prover)
        call = dataclasses.replace(call, query=query, key=key, value=value)
    reason = reason_to_stay(call, scale) or gradients
    key, value = call.key, call.value
    if not reason and leading is None:
        key, value = original_pair(key, value, node, node, prover)
    mask, unproven = mask_of(node, call, prover, leading)
    bias = kept = ahead = line = None
    if not reason and mask is None and leading is None and call.is_causal is False:
        found = bias_behind(call.attn_mask, call.query, key, node, prover)
        if found is not None:
            bias, mask, unproven = first_row(found.node, node), with_words(found.meaning), ""
            mask, kept = with_choice(mask, found.best), found.best
            ahead = found.ahead
        else:
            mask, unproven, line = by_distance(call, key, node, prover, unproven)
    mask_tensor = None
    if (
        not reason
        and bias is None
        and line is None
        and call.is_causal is False
        and readable(call.attn_mask, leading is not None)
    ):
        mask_tensor = readable_mask(call.attn_mask, query=call.query, key=key, writes=prover.writes)
    return make_site(
        node,
        query=call.query,
        key=key,
        value=value,
        scale=0.0 if scale is None else scale,
        mask=mask,
        unproven=unproven,
        mask_tensor=mask_tensor,
        key_bias=bias,
        distance_bias=line,
        kept=kept,
        ahead=ahead,
        dense_reason=reason,
        output_folded=leading is not None,
        dtype=example(node).dtype,
    )


def by_distance(
    call: SdpaCall, key: fx.Node, node: fx.Node, prover: MaskProver, unproven: str
) -> tuple[MaskMeaning | None, str, fx.Node | None]:
    """What a mask with a bias by distance in it means, or why not, and the line of the bias.

    unproven: why the mask is not proven without one.
    """
    found = distance_bias(call.attn_mask, node, call.query, key, prover)
    if found is None:
        return None, unproven, None
    proof = with_distance(prover.prove_steps(found.steps, call.query, key, node))
    return proof.meaning, proof.reason, found.line


def mask_of(
    node: fx.Node, call: SdpaCall, prover: MaskProver, leading: Leading | None
) -> tuple[MaskMeaning | None, str]:
    """What the mask arguments mean, or None and why that is not known."""
    if isinstance(call.is_causal, fx.Node):
        return None, "is_causal is not a constant"
    if call.attn_mask is not None:
        if shape_reason(call.query, call.key, call.value):
            return None, "shapes are not those of an attention"
        proof = prover.prove_mask(call.attn_mask, call.query, call.key, node, leading)
        return proof.meaning, proof.reason
    if call.is_causal:
        return MaskMeaning(causal=True, proof=("is_causal=True: k <= q",)), ""
    return MaskMeaning(causal=False, proof=("no mask: every key is seen",)), ""


def reason_to_stay(call: SdpaCall, scale: float | None) -> str:
    """Why a call must stay dense whatever its mask; "" if nothing stands in the way."""
    reason = shape_reason(call.query, call.key, call.value)
    if reason:
        return reason
    heads, kv_heads = shape_of(call.query)[1], shape_of(call.key)[1]
    if not (call.enable_gqa or same_size(heads, kv_heads) or same_size(kv_heads, 1)):
        return f"{heads} query heads and {kv_heads} key heads without enable_gqa"
    if scale is None:
        return "scale is not a constant"
    hides = call.attn_mask is not None or call.is_causal is not False
    if hides and not scale > 0:  # eager's kernel multiplies minus infinity by it for hidden keys
        return f"scale is {scale:g}: hidden keys may count in eager attention"
    if call.attn_mask is not None and call.is_causal is not False:
        return "attn_mask together with is_causal=True, which torch refuses"
    return dropout_reason(call.dropout_p)


SPELLING = Spelling("sdpa", match_sdpa, frozenset({"scaled_dot_product_attention"}))
