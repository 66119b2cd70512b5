"""A noted graph comes back as it was, whatever was done to its nodes in between."""

from __future__ import annotations

import torch
from torch import fx

from mpass.graph.snapshot import snapshot


def program(x: torch.Tensor) -> torch.Tensor:
    first = torch.cat([x, x + 1], dim=0)
    return first[:2] * torch.sum(first, dim=0)


def test_edits_of_arguments_order_and_meta_are_undone():
    gm = fx.symbolic_trace(program)
    code, given = gm.code, torch.arange(4.0).view(2, 2)
    add = next(node for node in gm.graph.nodes if "add" in node.name)
    add.meta["kept"] = 1
    noted = snapshot(gm.graph)

    add.meta["kept"] = 2
    with gm.graph.inserting_before(add):
        other = gm.graph.call_function(torch.neg, (add.args[0],))
    add.replace_all_uses_with(other)
    gm.graph.erase_node(add)
    total = next(node for node in gm.graph.nodes if "sum" in node.name)
    total.kwargs = {"dim": 1, "keepdim": True}
    gm.recompile()
    assert gm.code != code

    gm.graph = noted.restored()
    gm.graph.lint()
    assert gm.code == code
    assert torch.equal(gm(given), program(given))
    assert next(n for n in gm.graph.nodes if n.name == add.name).meta == {"kept": 1}
