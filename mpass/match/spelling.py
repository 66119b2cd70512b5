"""What a file of this package says about the spelling of attention that it matches."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import fx
from torch._ops import OpOverload, OpOverloadPacket

from mpass.graph.nodes import op_name
from mpass.graph.site import AttentionSite
from mpass.masks.prover import MaskProver


@dataclass(frozen=True)
class Spelling:
    """One way to write attention.

    name: as it stands in reports.
    match: the site around a node, or None. It is asked about the ops of `op_names` only.
    op_names: the ops at which it starts, by the name of `op_name` or, where that would be too
        general, by their schema (`minference::attention`). A sub-graph that holds one is inlined.
    """

    name: str
    match: Callable[[fx.Node, MaskProver], AttentionSite | None]
    op_names: frozenset[str]

    def starts_at(self, node: fx.Node) -> bool:
        """Whether a node calls one of the ops at which this spelling starts."""
        if node.op not in ("call_function", "call_method"):
            return False
        target = node.target
        if isinstance(target, OpOverload):
            target = target.overloadpacket
        if isinstance(target, OpOverloadPacket) and target._qualified_op_name in self.op_names:
            return True
        return op_name(node) in self.op_names
