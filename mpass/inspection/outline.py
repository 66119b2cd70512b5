"""A graph drawn small: one box per attention, and one per stretch of other calls between them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field

from torch import fx

from mpass.graph.nodes import layer_index, module_path
from mpass.graph.printing import full_op_name

NAMED_OPS = 4
"""Most frequent calls that a box names."""


@dataclass(slots=True)
class Box:
    """A node of the outline.

    kind: "attention", "index", "inputs" or "calls"; label: a module's path or an op's name;
    layer: as of a site; site: name of the attention's node, "" for other kinds; ops: calls by name.
    """

    kind: str
    label: str
    layer: int = -1
    site: str = ""
    ops: Counter[str] = field(default_factory=Counter)

    def text(self) -> str:
        """`27 calls: 6 linear, 4 view, ...`."""
        total = self.ops.total()
        most = ", ".join(
            f"{count} {short_name(name)}" for name, count in self.ops.most_common(NAMED_OPS)
        )
        more = ", ..." if len(self.ops) > NAMED_OPS else ""
        return f"{total} call{'s' * (total != 1)}: {most}{more}" if total else ""


@dataclass(frozen=True, slots=True)
class Outline:
    """Boxes in execution order, and edges between them as pairs of positions (from < to)."""

    boxes: tuple[Box, ...]
    edges: tuple[tuple[int, int], ...]


def outline(gm: fx.GraphModule, sites: Collection[str]) -> Outline:
    """The outline of a graph; `sites` are the names of its attention nodes.

    A stretch is a run of neighbours of one layer in execution order, so the outline has no cycles.
    """
    boxes: list[Box] = []
    place: dict[fx.Node, int] = {}
    for node in gm.graph.nodes:
        if node.op in ("output", "get_attr") or is_parameter(node):
            continue
        box = own_box(node, sites)
        if box is not None:
            boxes.append(box)
        elif is_index_part(node) and node.all_input_nodes[0] in place:
            place[node] = place[node.all_input_nodes[0]]
            continue
        else:
            label = "inputs" if node.op == "placeholder" else layer_path(node)
            kind = "inputs" if node.op == "placeholder" else "calls"
            if not boxes or (boxes[-1].kind, boxes[-1].label) != (kind, label):
                boxes.append(Box(kind, label, layer_index(label)))
        place[node] = len(boxes) - 1
        if name := full_op_name(node):
            boxes[-1].ops[name] += 1
    edges = {
        (place[source], place[node])
        for node in gm.graph.nodes
        if node in place
        for source in node.all_input_nodes
        if source in place and place[source] != place[node]
    }
    return Outline(tuple(boxes), tuple(sorted(edges)))


def own_box(node: fx.Node, sites: Collection[str]) -> Box | None:
    """A box for an attention or for index estimation; None for every other node."""
    name = full_op_name(node)
    ours = name.startswith("minference.")
    if not ours and node.name not in sites:
        return None
    path = module_path(node)
    attention = not ours or name.startswith("minference.sparse_attention")
    label = short_name(name) if not ours else name.removesuffix(".default")
    kind = "attention" if attention else "index"
    return Box(kind, label, layer_index(path), node.name if attention else "")


def short_name(name: str) -> str:
    """`scaled_dot_product_attention` of an op's full name, overload and namespace dropped."""
    parts = [part for part in name.split(".") if part]
    is_overload = len(parts) == 3 and parts[0] in ("aten", "minference", "prims")
    return parts[-2] if is_overload else parts[-1]


def is_index_part(node: fx.Node) -> bool:
    """Whether a node only unpacks an index."""
    sources = node.all_input_nodes
    return (
        full_op_name(node).endswith("getitem")
        and len(sources) == 1
        and full_op_name(sources[0]).startswith("minference.")
    )


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder holds a weight: not worth a line in a picture."""
    return node.op == "placeholder" and ("parameters" in node.name or "buffers" in node.name)


def layer_path(node: fx.Node) -> str:
    """The path of the layer that a node belongs to: `model.layers.3`; "" outside of any."""
    parts = module_path(node).split(".")
    for position, part in enumerate(parts):
        if part.isdecimal():
            return ".".join(parts[: position + 1])
    return ""
