"""Presses of kvpress shorten caches of models whose attention is sparse, as eagerly.

kvpress 0.5.5 reads `cache_position`, which layers of transformers 5.3 and later are not given: it
fails there without a compiler too, and this test tells so.
"""

from __future__ import annotations

import pytest
import torch

from tests.helpers.requirements import needs_package

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
kvpress = pytest.importorskip("kvpress", reason="kvpress is not installed")

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), needs_package("transformers", "no models")]

N = 512


@pytest.mark.parametrize("name", ["SnapKVPress", "KnormPress"])
def test_a_press_cuts_the_same_cache_as_eagerly(name):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=97,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    ids = torch.randint(0, 97, (1, N))
    press = getattr(kvpress, name)(compression_ratio=0.5)

    @torch.no_grad()
    def run(forward):
        cache = transformers.DynamicCache()
        with press(model):
            logits = forward(input_ids=ids, past_key_values=cache).logits
        return logits, [tuple(layer.keys.shape) for layer in cache.layers]

    try:
        expected, shapes = run(model)
    except KeyError as error:
        pytest.skip(f"kvpress does not run on this transformers: {error}")
    options = {"pattern": "block_sparse(100)", "dense_above": 2.0, "min_seq_len": 64}
    compiled = torch.compile(
        model, backend="minference", options=options | {"inner_backend": "eager"}
    )
    from torch._dynamo.utils import counters

    counters.clear()
    logits, own = run(compiled)
    assert own == shapes == [(1, 2, N // 2, 16)] * 2
    assert (logits - expected).abs().max() < 1e-5
    assert counters["minference"]["sparse_sites"] == 2
