"""Numbers of a device that somebody may read later: the host waits when it reads, not before.

They are kept in the host's memory. What is kept in a device's own would be an allocation that
outlives its call, which `mode="reduce-overhead"` forbids: all memory that a call takes there
belongs to the graph that is recorded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True, eq=False)
class Readback:
    """A tensor in the host's memory, or on its way there until `arrived` has passed."""

    tensor: Tensor
    arrived: torch.cuda.Event | None = None

    def read(self) -> Tensor:
        """The tensor, once it is there."""
        if self.arrived is not None:
            self.arrived.synchronize()
        return self.tensor


def read_later(tensor: Tensor) -> Readback:
    """Send a tensor to the host without waiting for it.

    While a CUDA graph is captured there are no numbers yet, and those of its replays are not this
    call's: all are NaN.
    """
    if not tensor.is_cuda:
        return Readback(tensor)
    if torch.cuda.is_current_stream_capturing():
        return Readback(torch.full(tensor.shape, math.nan, dtype=tensor.dtype))
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    host.copy_(tensor, non_blocking=True)
    with torch.cuda.device(tensor.device):
        arrived = torch.cuda.Event()
        arrived.record()
    return Readback(host, arrived)
