"""Masks of keys whose values only the graph itself knows: how many of them are real."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from tests.helpers.recording import record

N = 12


def tensors(batch):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(batch, 2, N, 8, generator=generator) for _ in range(3)]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_length_that_is_summed_up_in_the_graph_is_a_key_mask(batch):
    """Of HunyuanVideo: latents, and behind them the real tokens of a text."""

    def attention(query, key, value, text):
        end = N - text.shape[1] + text.sum(dim=1, dtype=torch.int)
        seen = torch.ones(batch, N, dtype=torch.bool)
        seen = seen.masked_fill(torch.arange(N).unsqueeze(0) >= end.unsqueeze(1), False)
        return F.scaled_dot_product_attention(query, key, value, seen[:, None, None])

    text = (torch.arange(4) < torch.tensor([[3], [1]])).long()[:batch]
    (found,), _ = record(attention, *tensors(batch), text)
    meaning = found.site.mask
    assert meaning is not None, found.site.unproven
    assert not meaning.causal and meaning.key_mask is not None
    assert found.wrong_cells() == 0 and found.error() < 1e-5
