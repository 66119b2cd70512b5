"""A promised loss where the host must not read what was found: the device alone acts on it."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import mpass
from mpass.lowering import dispatch
from mpass.lowering.index import ALL_BLOCKS, AttentionMask
from mpass.lowering.inputs import EstimateInputs
from mpass.lowering.triton import LOWERING
from tests.helpers.truth import dense_attention, random_attention

LENGTH, DIM = 300, 32


@pytest.fixture
def triton_on_cpu(monkeypatch):
    """Triton's lowering with the policy of a GPU; its kernels are interpreted on the CPU."""
    pytest.importorskip("triton")
    own = dataclasses.replace(LOWERING, device="cpu", serves=lambda inputs: None)
    monkeypatch.setattr(dispatch, "_added", dispatch._added | {"cpu": own})


@pytest.mark.usefixtures("triton_on_cpu")
@torch.no_grad()
def test_a_wrong_head_is_computed_whole_on_the_device_and_others_as_estimated():
    query, key, value = random_attention(heads=2, kv_heads=1, num_queries=LENGTH, head_dim=DIM)
    query[:, 1] = 60 * torch.nn.functional.normalize(key[:, 0], dim=-1)  # sees itself alone
    mask = AttentionMask()
    pattern = mpass.BlockSparse(1)
    index = mpass.BlockSparse.estimate(EstimateInputs(query, key, mask, [0, 1], 0.2), [pattern] * 2)
    arguments = (query, key, value, *index.tensors(), [0, 1], None, None, 0, 0, True, 0.2, 0.0)
    op = torch.ops.minference.sparse_attention.default
    bare = op(*arguments, 1.0, 0, 0, 0)
    with mpass.record() as log:
        out = op(*arguments, 1.0, 0, 0, 0, 0, 0.3)
    cells = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril().expand(1, 2, -1, -1)
    truth = dense_attention(query, key, value, cells, 0.2)
    assert not torch.allclose(bare[:, 0].double(), truth[:, 0], atol=1e-2)
    assert torch.allclose(out[:, 0].double(), truth[:, 0], atol=1e-4)
    assert torch.equal(out[:, 1], bare[:, 1])
    (call,) = log.calls
    assert call.lowering == "triton"
    assert call.density[0, 0] == 1.0 > call.density[0, 1]
    assert not bool((index.block_count == ALL_BLOCKS).any())
