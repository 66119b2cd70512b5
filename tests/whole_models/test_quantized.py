"""Linear layers that are 2:4 sparse and in 8 bits leave attention sparse: `make quantized`."""

from __future__ import annotations

import pytest
import torch

from benchmarks import quantized
from tests.helpers.requirements import needs_package

pytestmark = [pytest.mark.usefixtures("fresh_dynamo"), needs_package("transformers", "no models")]


def tiny(kind):
    """A model of two layers, how it is run, and its input of 2304 tokens or a little more."""
    import transformers

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    if kind == "vision":
        config = transformers.ViTConfig(
            **sizes, num_attention_heads=2, image_size=192, patch_size=4
        )
        return (
            transformers.ViTModel(config).eval(),
            quantized.run_picture,
            torch.randn(1, 3, 192, 192),
        )
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2)
    return transformers.LlamaModel(config).eval(), quantized.run_text, torch.randn(1, 2304, 64)


@pytest.mark.parametrize("model", ["vision", "text"])
@pytest.mark.parametrize("kind", ["2:4", "8 bits", "2:4 in 8 bits"])
def test_sites_stay_sparse_and_outputs_as_near_as_rounding_allows(kind, model):
    if kind != "2:4":
        pytest.importorskip("torchao", reason="torchao is not installed: make quantized")
    plain, run, given = tiny(model)
    weights = [layer.weight for layer in plain.modules() if isinstance(layer, torch.nn.Linear)]
    row = quantized.measure(kind, plain, run, given)
    assert (row["sparse"], row["sites"], row["breaks"]) == (2, 2, 0)
    assert row["distance"] < (1e-5 if kind == "2:4" else 2 * row["control"])
    assert all(bool((weight != 0).all()) for weight in weights), "the model itself was cut"


def test_two_of_each_four_weights_are_cut():
    layer = torch.nn.Linear(8, 3)
    with torch.no_grad():
        layer.weight[0] = torch.tensor([1.0, -4, 3, 2, 0.5, 0.25, -0.75, 0])
    quantized.cut_two_of_four(layer)
    assert layer.weight[0].tolist() == [0, -4, 3, 0, 0.5, 0, -0.75, 0]
    assert bool(((layer.weight.unflatten(1, (-1, 4)) != 0).sum(-1) <= 2).all())
