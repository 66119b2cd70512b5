"""One attention found in a graph: what it reads, where it stands, and what its mask means.

Nothing here edits a graph.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import torch
from torch import fx

Length = int | torch.SymInt

TORCH = os.path.dirname(torch.__file__) + os.sep
"""Where torch's own Python files lie."""


@dataclass(frozen=True)
class MaskMeaning:
    """What an attention's mask was proven to mean; `None` for a site's `mask` means unproven.

    Query row i stands at position `query_offset + i`; key j is visible iff all of these hold:
    causal: `j <= position`; window > 0: `position - j < window`; key_mask: its entry [b, j] is
    true; valid_keys: `j < valid_keys`.

    proof: the argument in words, one line per conjunct, for the report.
    """

    causal: bool
    query_offset: Length | fx.Node = 0
    window: int = 0
    key_mask: fx.Node | None = None
    valid_keys: Length | None = None
    proof: tuple[str, ...] = ()


@dataclass(frozen=True)
class ListedBlocks:
    """Nodes of a BlockMask's lists, to be checked against the mask in every call.

    As in mpass.lowering.block_mask.BlockLists; query_block, key_block: tokens in a block.
    """

    kv_num_blocks: fx.Node
    kv_indices: fx.Node
    full_kv_num_blocks: fx.Node | None
    full_kv_indices: fx.Node | None
    query_block: int
    key_block: int


@dataclass(frozen=True)
class AttentionSite:
    """One matched attention. Nodes are those of the captured graph.

    query [B, H, Nq, D], key [B, Hk, Nk, D], value [B, Hk, Nk, Dv] are the nodes before any
    repetition of kv heads; output is the node whose uses the rewritten attention takes over, and
    `output_transposed` tells that it is [B, Nq, H, Dv] instead of [B, H, Nq, Dv].
    mask: what the mask means, or None with `unproven` telling why.
    dense_reason: why the site must stay dense whatever the mask (dropout, weights returned, ...).
    listed: flex_attention's lists of blocks, if they may say something else than the mask.
    """

    output: fx.Node
    query: fx.Node
    key: fx.Node
    value: fx.Node
    scale: float
    mask: MaskMeaning | None
    spelling: str
    path: str = ""
    layer: int = -1
    softcap: float = 0.0
    sinks: fx.Node | None = None
    output_transposed: bool = False
    unproven: str = ""
    dense_reason: str = ""
    source: str = ""
    listed: ListedBlocks | None = None

    @property
    def num_heads(self) -> int:
        return head_count(self.query)

    @property
    def num_kv_heads(self) -> int:
        return head_count(self.key)

    @property
    def head_dim(self) -> int:
        return int(shape_of(self.query)[-1])


def example(node: fx.Node) -> torch.Tensor:
    """The fake tensor that a node stands for, from Dynamo's graph or an exported one."""
    value = node.meta.get("example_value", node.meta.get("val"))
    if not isinstance(value, torch.Tensor):
        raise TypeError(f"node {node.name} has no example tensor")
    return value


def shape_of(node: fx.Node) -> torch.Size:
    """Shape of the tensor that a node stands for."""
    return example(node).shape


def head_count(node: fx.Node) -> int:
    """Heads of a tensor [.., H, N, D]; 1 if it has none (such a site stays dense)."""
    shape = shape_of(node)
    return int(shape[-3]) if len(shape) >= 3 else 1


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that a node was traced in: `model.layers.3.self_attn`.

    Empty when the compiled module is itself the attention's owner.
    """
    stack = node.meta.get("nn_module_stack") or {}
    if not stack:
        return ""
    path = str(list(stack.values())[-1][0])
    path = re.sub(r"^L\['self'\]\.?|^L__self___", "", path)
    path = re.sub(r"_modules\['([^']*)'\]", r"\1", path)
    return re.sub(r"\[['\"]?([^'\"\]]*)['\"]?\]", r".\1", path).strip(".")


def layer_index(path: str) -> int:
    """Layer number that a module path names: its first integer component, or -1.

    T5's `encoder.block.3.layer.0.SelfAttention` has two; the block is the first.
    """
    for part in path.split("."):
        if part.isdecimal():
            return int(part)
    return -1


def source_line(node: fx.Node) -> str:
    """The innermost line of the user's model that a node came from: `file:line, in name`.

    Lines inside of torch (flex_attention is one of its Python functions) say nothing to a user.
    """
    trace = node.meta.get("stack_trace") or ""
    frames: list[tuple[str, str, str]] = re.findall(r'File "(.*)", line (\d+), in (\S+)', trace)
    own = [frame for frame in frames if not frame[0].startswith(TORCH)] or frames
    return "{}:{}, in {}".format(*own[-1]) if own else ""
