"""The op that reads a mask at run time: `minference::read_mask`, once per mask of a graph.

Its results go to every attention under that mask. What they mean: lowering/mask_forms.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mpass.failures import contain
from mpass.lowering.define import define_op, fake_of
from mpass.lowering.dispatch import device_lowering
from mpass.lowering.mask_forms import MaskForm, read_mask


def as_four(mask: Tensor) -> Tensor:
    """A mask of two to four dimensions as [B or 1, H or 1, Nq, Nk]."""
    return mask[(None,) * (4 - mask.dim())]


@define_op(
    "read_mask",
    "(Tensor mask) -> (Tensor, Tensor, Tensor, Tensor)",
    chooses=True,
    tags=(torch.Tag.cudagraph_unsafe,),
)
def read_mask_op(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The form of a mask: numbers int64 [5] on the CPU, key_mask [B, Nk], first, last [B, Nq].

    mask: [.., Nq, Nk] of two to four dimensions, bool or additive. B is its own batch, 1 or more.
    Never fails: what cannot be read is of an unknown form, and dense attention runs under it. So it
    does on a device whose host would wait for what is read, a GPU: no plan puts this op there, and
    by hand it reads nothing.
    """
    cells = as_four(mask)
    try:
        if device_lowering(mask.device).decides_by_cost:
            read = read_mask(cells)
            key_mask, first, last = (t.clone() for t in (read.key_mask, read.first, read.last))
            return read.form.tensor(), key_mask, first, last
    except Exception as error:
        contain(error, "reading a mask")
    batch, _, num_queries, num_keys = cells.shape
    key_mask = torch.ones(batch, num_keys, dtype=torch.bool, device=mask.device)
    first = torch.zeros(batch, num_queries, dtype=torch.int64, device=mask.device)
    return MaskForm().tensor(), key_mask, first, first.clone()


@fake_of("read_mask")
def _(mask: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, _, num_queries, num_keys = as_four(mask).shape
    return (
        torch.empty(5, dtype=torch.int64, device="cpu"),
        mask.new_empty(batch, num_keys, dtype=torch.bool),
        mask.new_empty(batch, num_queries, dtype=torch.int64),
        mask.new_empty(batch, num_queries, dtype=torch.int64),
    )
