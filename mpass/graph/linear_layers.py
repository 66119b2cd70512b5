"""Linear layers in other numbers: 16 bits or fp32 where that is faster, 8 bits where that is asked.

`options={"linear": "auto"}`, the default, multiplies layers of bf16 in half precision where this
processor is fastest at that, which is no farther from fp32 than what eager bf16 rounds away
(docs/linear.md), and else in fp32 where that is faster, which loses nothing and is all that
`"fp32"` does. `"half"` multiplies layers of fp16 in half precision as well. With
`options={"linear": "int8"}` a layer whose weight is a parameter reads levels of its rotated input
(lowering/reference/linear.py), which the layers that read the same tensor share. The rest of the
graph sees a tensor of the same dtype. What is not served keeps its products, and the report counts
why.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from mpass.graph.arguments import bind
from mpass.graph.new_nodes import copy_meta, propagate, value_key
from mpass.graph.nodes import example, number_now, op_name, value_of
from mpass.graph.writes import StorageWrites
from mpass.lowering import linear_op
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.linear_op import FEWEST_ROWS
from mpass.lowering.reference.linear import GROUP

VOCABULARY = 8
"""A layer with that many times more outputs than inputs makes logits, which 8 bits would blur."""

CUSTOM_PASSES = (
    *("joint_custom_pre_pass", "joint_custom_post_pass"),
    *("post_grad_custom_pre_pass", "post_grad_custom_post_pass"),
)
"""Options of Inductor that hold passes of other packages."""


def narrow_linear_layers(gm: fx.GraphModule) -> tuple[str, ...]:
    """Put products of 8-bit numbers in place of the linear layers of a graph.

    Returns a sentence for the report: how many there are and why others keep their products.
    """
    layers = [node for node in gm.graph.nodes if is_linear(node)]
    if not layers:
        return ()
    if foreign_pass():
        return (f"0 of {len(layers)} linear layers in 8 bits: another package edits graphs later",)
    writes = StorageWrites(gm.graph)
    kept: Counter[str] = Counter()
    levels: dict[fx.Node, tuple[fx.Node, fx.Node]] = {}
    for node in layers:
        reason = reason_against(node, writes)
        if reason:
            kept[reason] += 1
        else:
            replace_layer(node, levels, share=not writes.ever_written(bind(node)["input"]))
    gm.recompile()
    done = len(layers) - kept.total()
    return (f"{done} of {len(layers)} linear layers in 8 bits{because(kept)}",)


def hasten_linear_layers(gm: fx.GraphModule) -> tuple[str, ...]:
    """Multiply linear layers of bf16 in what this processor is fastest at.

    That is half precision, unless the user has forbidden torch to sum products of bf16 in fewer
    bits than fp32, or fp32. Returns a sentence for the report if there are any.
    """
    if foreign_pass():
        return ()
    notes: tuple[str, ...] = ()
    if reduced_sums_allowed() and any(pays(node, slow_in_half) for node in gm.graph.nodes):
        op = torch.ops.minference.linear_in_half.default
        done, total, _ = change_products(gm, op, slow_in_half)
        if done:
            what = f"{done} of {total} linear layers of bf16 multiply in half precision"
            notes = (f"{what}, fastest here (linear='fp32' has none that rounds a product)",)
    return (*notes, *widen_linear_layers(gm))


def widen_linear_layers(gm: fx.GraphModule) -> tuple[str, ...]:
    """Multiply linear layers of bf16 in fp32 where this processor is faster at that.

    Returns a sentence for the report if there are any.
    """
    if foreign_pass() or not any(pays(node, slow_in_fp32) for node in gm.graph.nodes):
        return ()
    done, total, _ = change_products(gm, torch.ops.minference.linear_in_fp32.default, slow_in_fp32)
    if not done:
        return ()
    return (f"{done} of {total} linear layers of bf16 multiply in fp32, faster here",)


def halve_linear_layers(gm: fx.GraphModule) -> tuple[str, ...]:
    """Multiply linear layers of bf16 and fp16 in half precision, on processors that do.

    Returns sentences for the report: how many there are and why others keep their products.
    """
    if foreign_pass():
        return ("no linear layers in half precision: another package edits graphs later",)
    op = torch.ops.minference.linear_in_half.default
    done, total, kept = change_products(gm, op, half_linear_reason)
    if not total:
        return ()
    counts = f"{done} of {total} linear layers in half precision{because(kept)}"
    return (counts, *widen_linear_layers(gm))


def change_products(
    gm: fx.GraphModule, op: Any, against: Callable[[torch.dtype, torch.device], str]
) -> tuple[int, int, Counter[str]]:
    """Put `op` in the place of linear layers; how many, of how many, and why not of the others.

    against: why a device does not take layers of a dtype so.
    """
    layers = [node for node in gm.graph.nodes if is_linear(node)]
    writes = StorageWrites(gm.graph)
    kept: Counter[str] = Counter()
    for node in layers:
        found = bind(node)
        weight = example(found["weight"])
        reason = reason_against_change(node, writes)
        reason = reason or (f"fewer than {FEWEST_ROWS} rows" if few_rows(node) else "")
        reason = reason or against(weight.dtype, weight.device)
        if reason:
            kept[reason] += 1
            continue
        with node.graph.inserting_before(node):
            arguments = (found["input"], found["weight"], found.get("bias"))
            new = node.graph.call_function(op, arguments)
            copy_meta(node, new)
            new.meta[value_key(node)] = value_of(node)  # of the same sizes, in rows
        node.replace_all_uses_with(new)
        node.graph.erase_node(node)
    done = len(layers) - kept.total()
    if done:
        gm.recompile()
    return done, len(layers), kept


def slow_in_fp32(dtype: torch.dtype, device: torch.device) -> str:
    """Why layers of a dtype are not made fp32 on a device; "" where they are."""
    return "" if device_lowering(device).fp32_linear_pays(dtype) else "no faster in fp32"


def slow_in_half(dtype: torch.dtype, device: torch.device) -> str:
    """Why layers of a dtype are not put into half precision unasked; "" where they are."""
    return (
        "" if device_lowering(device).half_linear_pays(dtype) else "not fastest in half precision"
    )


def reduced_sums_allowed() -> bool:
    """Whether torch may sum products of bf16 in fewer bits than fp32, as it may by default.

    The switch is called after cuBLAS and says what a user wants of bf16. Dynamo guards it. What
    torch allows for products of fp32 (`set_float32_matmul_precision` and its kin) says nothing
    about those of bf16.
    """
    return bool(torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction)


def half_linear_reason(dtype: torch.dtype, device: torch.device) -> str:
    """Why layers of a dtype are not multiplied in half precision on a device."""
    return device_lowering(device).half_linear_reason(dtype)


def because(kept: Counter[str]) -> str:
    """Why layers keep their products, in brackets; "" if none does."""
    why = "; ".join(f"{count} not: {reason}" for reason, count in kept.most_common())
    return f" ({why})" if why else ""


def pays(node: fx.Node, against: Callable[[torch.dtype, torch.device], str]) -> bool:
    """Whether a node is a linear layer of enough rows of a dtype that nothing is said against."""
    if not is_linear(node) or few_rows(node):
        return False
    weight = example(bind(node)["weight"])
    return not against(weight.dtype, weight.device)


def foreign_pass() -> bool:
    """Whether another package has a pass of Inductor's edit graphs after this one.

    zentorch sets such a pass for the whole process when it is first used, and with it the results
    of 8-bit layers were wrong.
    """
    from torch._inductor import config

    return any(getattr(config, name, None) is not None for name in CUSTOM_PASSES)


def is_linear(node: fx.Node) -> bool:
    """Whether a node is a linear layer of tensors whose values are known."""
    if node.op != "call_function" or op_name(node) != "linear":
        return False
    found = bind(node)
    tensors = (found.get("input"), found.get("weight"), node)
    return all(isinstance(n, fx.Node) and isinstance(value_of(n), Tensor) for n in tensors)


def reason_against(node: fx.Node, writes: StorageWrites) -> str:
    """Why a linear layer keeps its products; "" where 8 bits serve it."""
    if reason := reason_against_change(node, writes):
        return reason
    weight = example(bind(node)["weight"])
    outputs, inputs = (number_now(size) for size in weight.shape[-2:])
    if outputs > VOCABULARY * inputs:
        return "makes logits"
    if inputs % GROUP:
        return f"the number of inputs is no multiple of {GROUP}"
    if few_rows(node):
        return f"fewer than {FEWEST_ROWS} rows"
    return device_lowering(weight.device).linear_reason(weight.dtype)


def reason_against_change(node: fx.Node, writes: StorageWrites) -> str:
    """Why a linear layer must stay as it is, whatever its products are taken in."""
    found = bind(node)
    rows, weight, out = example(found["input"]), example(found["weight"]), example(node)
    if out.requires_grad:
        return "gradients are recorded"
    if found["weight"].op not in ("placeholder", "get_attr") or not isinstance(
        weight, torch.nn.Parameter
    ):
        return "the weight is no parameter"
    if is_traceable_wrapper_subclass(weight) or is_traceable_wrapper_subclass(rows):
        return "a tensor of another class multiplies in its own way"
    if writes.ever_written(found["weight"]):
        return "the weight is written to"
    if not rows.dtype == weight.dtype == out.dtype:
        return "autocast chooses the dtype"
    if weight.dim() != 2 or not all(isinstance(size, int) for size in weight.shape):
        return "the size of the weight is not known"
    return ""


def few_rows(node: fx.Node) -> bool:
    """Whether the input of a linear layer has fewer rows than other numbers need to pay."""
    count = 1
    for size in example(bind(node)["input"]).shape[:-1]:
        count *= max(number_now(size), 0)
    return count < FEWEST_ROWS


def replace_layer(
    node: fx.Node, levels: dict[fx.Node, tuple[fx.Node, fx.Node]], *, share: bool
) -> None:
    """Put the ops of 8 bits in place of one linear layer; `levels` are those of inputs so far."""
    found, graph = bind(node), node.graph
    rows, weight, bias = found["input"], found["weight"], found.get("bias")

    def add(target: Any, *args: Any) -> fx.Node:
        new = graph.call_function(target, args)
        copy_meta(node, new)
        propagate(new, node)
        return new

    with graph.inserting_before(node):
        ready = levels.get(rows) if share else None
        if ready is None:
            pair = add(torch.ops.minference.quantize_rows.default, rows)
            ready = add(operator.getitem, pair, 0), add(operator.getitem, pair, 1)
            levels[rows] = ready
        product = add(torch.ops.minference.multiply_rows.default, ready[0], weight)
        result = add(torch.ops.aten.mul.Tensor, product, ready[1])
        if bias is not None:
            result = add(torch.ops.aten.add.Tensor, result, bias)
        result = add(torch.ops.prims.convert_element_type.default, result, example(node).dtype)
    node.replace_all_uses_with(result)
    graph.erase_node(node)


__all__ = [
    "halve_linear_layers",
    "hasten_linear_layers",
    "linear_op",
    "narrow_linear_layers",
    "widen_linear_layers",
]
