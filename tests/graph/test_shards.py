"""Which slice of its layer's heads an attention is, as the shapes of sharded weights tell."""

from __future__ import annotations

import types

import pytest
import torch
from torch import nn

from mpass.errors import ConfigMismatchError
from mpass.graph.shards import HeadSlice, OwnedHeads, Shard, decide, owned_heads

SECOND = HeadSlice(1, 2)
"""The second of two ranks."""


def made(size: int) -> Shard:
    """A projection whose outputs are split."""
    return Shard(True, size, SECOND)


def read(size: int) -> Shard:
    """An output projection, whose inputs are split."""
    return Shard(False, size, SECOND)


@pytest.mark.parametrize(
    ("shards", "expected"),
    [
        ([made(8 * 16), made(4 * 16), made(4 * 16), read(8 * 16)], SECOND),
        ([made(8 * 16), made(4 * 16), made(4 * 16)], SECOND),
        ([made(16 * 16), read(8 * 16)], SECOND),  # one fused projection, or gated queries
        ([made(4 * 16), made(2 * 16), read(4 * 16)], None),  # gathered: all 4 heads are here
        ([made(4 * 16), made(2 * 16)], None),
        ([made(8 * 16), read(4 * 16)], None),  # fused and gathered: 4 heads, 2 kv heads
        ([made(96)], None),
    ],
)
def test_the_weights_of_an_attention_tell_its_slice(shards, expected):
    assert decide(shards, num_heads=4, head_dim=16, value_dim=16) == expected


def test_values_of_another_size_than_queries_are_read_by_the_output_projection():
    shards = [made(8 * 24), read(8 * 12)]
    assert decide(shards, num_heads=4, head_dim=24, value_dim=12) == SECOND


def test_one_process_owns_all_heads_or_what_it_is_told():
    modules = [nn.Linear(8, 8)]
    assert owned_heads(modules, 4, 16, 16) == OwnedHeads()
    assert owned_heads(modules, 4, 16, 16, head_offset=4) == OwnedHeads(4)


def test_of_several_processes_a_part_of_the_heads_may_be_unseen(monkeypatch):
    monkeypatch.setattr("mpass.graph.shards.is_distributed", lambda: True)
    module = nn.Linear(8, 8)
    module.config = types.SimpleNamespace(num_attention_heads=8)
    assert owned_heads([module], 8, 16, 16) == OwnedHeads()
    assert owned_heads([module], 4, 16, 16, head_offset=4) == OwnedHeads(4)
    heads = owned_heads([module], 4, 16, 16)
    assert heads == OwnedHeads(unseen=8)
    with pytest.raises(ConfigMismatchError, match="layer 3 has 4 of the model's 8 query heads"):
        heads.check_known(4, 3)
    assert owned_heads([torch.nn.Identity()], 4, 16, 16) == OwnedHeads()
