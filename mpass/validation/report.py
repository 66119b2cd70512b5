"""Where a proof and a graph differ, as a report that is ready to paste."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpass.errors import in_one_line
from mpass.graph.nodes import op_name
from mpass.graph.site import AttentionSite
from mpass.graph.writes import StorageWrites
from mpass.masks.conjuncts import HIDDEN
from mpass.validation.claims import (
    attention_inputs,
    claimed_bias,
    claimed_cells,
    tolerance,
)
from mpass.validation.samples import next_node
from mpass.validation.slices import (
    NotRunError,
    Run,
    part_of,
)

REASON = "what its mask was proven to mean is not what the model computes: a fault of mpass"
"""Why an attention stays dense whose proof did not hold; the warning has the particulars."""


@dataclass(frozen=True)
class Difference:
    """Where a claim and the graph differ: what was compared, how many cells, the first of them."""

    what: str
    count: int
    first: tuple[str, ...]


class Named:
    """A node in a signature."""

    def __init__(self, names: dict[fx.Node, Any], node: fx.Node) -> None:
        self.name = names.get(node, node.name)

    def __repr__(self) -> str:
        return f"<{self.name}>"


def differing(
    what: str, wrong: Tensor, rows: Tensor, got: Tensor, claimed: Tensor | None
) -> Difference:
    """The difference that a tensor of wrong cells shows."""
    cells = wrong.nonzero()
    first = []
    for cell in cells[:5].tolist():
        place = tuple(cell)
        position = list(cell)
        if len(position) >= 2:
            position[-2] = int(rows[position[-2]])
        values = f"the graph has {got[place].item():g}"
        if claimed is not None:
            values += f", the proof says {claimed[place].item():g}"
        first.append(f"{position}: {values}")
    return Difference(what, len(cells), tuple(first))


def differing_bias(site: AttentionSite, run: Run, rows: Tensor, got: Tensor) -> Difference | None:
    """Where a mask with a bias by distance in it is not what is claimed; None if it is."""
    cells, bias = torch.broadcast_tensors(
        claimed_cells(site.mask, run, site, rows), claimed_bias(site, run, rows)[None]
    )
    got = got.expand(cells.shape)
    slack = tolerance(site) * (1 + bias.abs())
    wrong = torch.where(cells, ~((got - bias).abs() <= slack), ~(got <= HIDDEN))
    if not wrong.any():
        return None
    claimed = bias.masked_fill(~cells, -torch.inf)
    return differing("a mask with a bias by distance", wrong, rows, got, claimed)


def bug_report(site: AttentionSite, difference: Difference) -> str:
    """What to paste into a report: where, what was proven, what differs, versions."""
    import mpass

    mask = site.mask
    writes = StorageWrites(site.output.graph)
    try:
        part = part_of([site.output], attention_inputs(site), next_node(site.output), writes)
        ops = " ".join(op_name(node) for node in part.nodes)
    except (NotRunError, LookupError) as error:
        ops = in_one_line(error)
    lines = [
        f"{REASON}. It stays dense. Please report this text:",
        f"  site: {site.spelling} attention {site.path or site.output.name} at {site.source}",
        f"  ops: {ops}",
        *(f"  proof: {line}" for line in (mask.proof if mask is not None else ())),
        f"  differs: {difference.what}, {difference.count} cells looked at",
        *(f"    {line}" for line in difference.first),
        f"  versions: mpass {mpass.__version__}, torch {torch.__version__}, "
        f"python {platform.python_version()}",
    ]
    return "\n".join(lines)
