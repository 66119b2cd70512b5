"""One step of distributed training on two processes, for tests/training/test_trainers.py.

    python -m tests.helpers.two_ranks_training FOLDER replicated

starts two processes, each of which writes its parameters after the step to FOLDER/rank<n>.pt. They
hold the model whole under DistributedDataParallel, or in halves (`sharded`) under fully_shard.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional as F

import mpass

LENGTH = 150

OPTIONS: dict[str, Any] = {
    "training": "sparse",
    "pattern": "block_sparse(99)",
    "min_seq_len": 1,
    "dense_above": 1.0,
    "inner_backend": "aot_eager",
}


class Attention(nn.Module):
    """Causal attention of two heads over one kv head."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.pair = nn.Linear(64, 128), nn.Linear(64, 128)
        self.out = nn.Linear(128, 64)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        query = self.query(x).view(batch, length, 2, 64).transpose(1, 2)
        key, value = self.pair(x).view(batch, length, 2, 1, 64).permute(2, 0, 3, 1, 4)
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        return self.out(out.transpose(1, 2).flatten(2))


def one_step(rank: int | None, kind: str = "") -> dict[str, Any]:
    """Parameters after a step on this rank's half of a batch, or on all of it, and sparse sites.

    kind: "replicated" or "sharded", of a rank.
    """
    torch.manual_seed(0)
    torch._dynamo.reset()
    model: nn.Module = Attention()
    x = torch.randn(2, LENGTH, 64)
    if rank is not None:
        x = x[rank : rank + 1]
    if kind == "replicated":
        model = nn.parallel.DistributedDataParallel(model)
    elif kind == "sharded":
        fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    run = torch.compile(model, backend="minference", options=OPTIONS)
    optimiser = torch.optim.SGD(model.parameters(), lr=1.0)
    run(x).square().mean().backward()
    optimiser.step()
    inner = model.module if kind == "replicated" else model
    parameters = {name: whole(parameter) for name, parameter in inner.named_parameters()}
    return {**parameters, "sparse sites": len(mpass.last_report().sparse_sites)}


def whole(parameter: Tensor) -> Tensor:
    """A parameter's numbers, gathered from all ranks where it is sharded."""
    parameter = parameter.detach()
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def work(rank: int, folder: str, kind: str) -> None:
    """What one of the processes does."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    torch.save(one_step(rank, kind), Path(folder) / f"rank{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    mp.spawn(work, (sys.argv[1], sys.argv[2]), nprocs=2)
