"""Which heads of a layer a rank owns, read from how its weights are sharded.

Under tensor parallelism each rank holds a slice of every projection, and with it a slice of the
heads. The weights say so themselves: they are DTensors, whose placements name the dimension that is
split, and whose mesh knows the rank. transformers' `DistributedConfig(tp_plan="auto")` makes them,
and torch's own `parallelize_module`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from mpass.errors import ConfigMismatchError

TP = "tp"
"""How meshes of several dimensions name the one of tensor parallelism."""


@dataclass(frozen=True)
class HeadSlice:
    """The place of a rank among those that share the heads of a layer.

    rank: counted from 0; ranks: how many share them, each an equal part.
    """

    rank: int
    ranks: int

    def offset(self, num_heads: int) -> int:
        """The first head of this rank, which owns `num_heads` of them."""
        return self.rank * num_heads

    def total(self, num_heads: int) -> int:
        """All heads of the layer, where this rank owns `num_heads` of them."""
        return self.ranks * num_heads


@dataclass(frozen=True)
class OwnedHeads:
    """Which heads of its layer an attention owns.

    offset: the first one; None where it owns all, or where nothing tells.
    total: how many the layer has, where a slice knows it.
    unseen: how many a layer has as the model says, where the attention has a part of them and
        nothing tells which; 0 else.
    """

    offset: int | None = None
    total: int | None = None
    unseen: int = 0

    def check_known(self, num_heads: int, layer: int) -> None:
        """Raise ConfigMismatchError where nothing tells which heads these are: some are named."""
        if self.unseen:
            where = f"layer {layer}" if layer >= 0 else "an attention of unknown layer"
            raise ConfigMismatchError(
                f"{where} has {num_heads} of the model's {self.unseen} query heads in this "
                "process, and its weights do not say which; say it by head_offset= of "
                "mpass.configure, or give one pattern for all heads"
            )


def owned_heads(
    modules: list[nn.Module],
    num_heads: int,
    head_dim: int,
    value_dim: int,
    head_offset: int | None = None,
) -> OwnedHeads:
    """The heads of its layer that an attention owns.

    modules: those around the attention, innermost first.
    num_heads: the query heads that it computes; head_dim, value_dim: the sizes of a head.
    head_offset: the first head, where the user says it; else the weights do.
    """
    if not is_distributed():
        return OwnedHeads(head_offset)
    own = head_slice(modules, num_heads, head_dim, value_dim)
    if own is not None:
        offset = own.offset(num_heads) if head_offset is None else head_offset
        return OwnedHeads(offset, own.total(num_heads))
    return OwnedHeads(
        head_offset, unseen=0 if head_offset is not None else unseen(modules, num_heads)
    )


def unseen(modules: list[nn.Module], num_heads: int) -> int:
    """The heads of a layer as the model's sizes say, if these are a part of them; else 0.

    Of several processes, each may own a slice of heads by means that weights do not show.
    """
    for module in modules:
        sizes = getattr(module, "config", None)
        text_sizes = getattr(sizes, "get_text_config", None)
        number = getattr(text_sizes() if text_sizes else sizes, "num_attention_heads", None)
        if isinstance(number, int):
            return number if number > num_heads and number % num_heads == 0 else 0
    return 0


def is_distributed() -> bool:
    """Whether this process is one of several."""
    distributed = torch.distributed
    return (
        distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size() > 1
    )


def head_slice(
    modules: Iterable[nn.Module], num_heads: int, head_dim: int, value_dim: int
) -> HeadSlice | None:
    """The slice that an attention of `num_heads` heads is of its layer; None for a whole layer.

    modules: those around the attention, innermost first; the first with sharded weights decides.
    head_dim, value_dim: elements of a head's query and of its value.

    A projection may be sharded and its output gathered, so that a rank computes all heads. The
    output projection tells: it reads one value of each head, and its slice is as wide as what this
    rank computes. Where it is not sharded, the projection of the queries has to tell.
    """
    for module in modules:
        weights = [shard for weight in module.parameters() if (shard := read_shard(weight))]
        if weights:
            return decide(weights, num_heads, head_dim, value_dim)
    return None


@dataclass(frozen=True)
class Shard:
    """One sharded weight [out, in]: which of both is split, its whole size, and who holds what."""

    of_outputs: bool
    size: int
    place: HeadSlice

    @property
    def own(self) -> int:
        """The size of the part that a rank holds."""
        return self.size // self.place.ranks


def decide(shards: list[Shard], num_heads: int, head_dim: int, value_dim: int) -> HeadSlice | None:
    """The slice that the weights of one attention tell of."""
    read, made = num_heads * value_dim, num_heads * head_dim
    inputs = [shard for shard in shards if not shard.of_outputs]
    if any(shard.size == read for shard in inputs):
        return None
    found = [shard for shard in inputs if shard.own == read]
    if not inputs:  # the queries' projection is the largest
        largest = max(shards, key=lambda shard: shard.size)
        found = [largest] if largest.own == made else []
    return found[0].place if found else None


def read_shard(weight: torch.Tensor) -> Shard | None:
    """How a weight is split evenly among the ranks of tensor parallelism; None if it is not."""
    from torch.distributed.tensor import DTensor

    if not isinstance(weight, DTensor) or weight.dim() != 2:
        return None
    mesh: Any = weight.device_mesh
    names = mesh.mesh_dim_names or ()
    placements: tuple[Any, ...] = weight.placements
    for number, placement in enumerate(placements):
        if not placement.is_shard() or (TP in names and names[number] != TP):
            continue
        shard: Any = placement
        dim = shard.dim % weight.dim()
        ranks = mesh.size(number)
        if ranks == 1 or weight.shape[dim] % ranks:
            continue
        place = HeadSlice(mesh.get_local_rank(number), ranks)
        return Shard(dim == 0, weight.shape[dim], place)
    return None
