"""attn_implementation="minference": no mask is built, and the pass gives the same ops."""

from __future__ import annotations

import copy

import pytest
import torch

import mpass
from mpass.transformers_attention import describe_mask, register_attention
from tests.helpers.toys import RecordingBackend

transformers = pytest.importorskip("transformers", reason="needs transformers")

FULL = mpass.VerticalSlash(1, 1 << 20)


@pytest.fixture(autouse=True)
def registered(fresh_dynamo):
    register_attention()


def tiny(kind: str, **settings):
    config = transformers.AutoConfig.for_model(
        kind,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        vocab_size=99,
        **settings,
    )
    torch.manual_seed(0)
    ours, eager = (
        transformers.AutoModelForCausalLM.from_config(
            copy.deepcopy(config), attn_implementation=implementation
        ).eval()
        for implementation in ("minference", "eager")
    )
    eager.load_state_dict(ours.state_dict())
    return ours, eager


MODELS = [
    ("llama", {}),
    ("mistral", {"sliding_window": 40}),
    ("gemma2", {"sliding_window": 40, "query_pre_attn_scalar": 16}),
    ("gemma3_text", {"sliding_window": 40}),
    ("qwen3", {}),
    ("llama4_text", {"attention_chunk_size": 64, "intermediate_size_mlp": 64}),
]


@pytest.mark.parametrize(("kind", "settings"), MODELS, ids=[kind for kind, _ in MODELS])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_model_equals_eager_compiled_and_not(kind, settings, padded):
    ours, eager = tiny(kind, **settings)
    ids = torch.randint(0, 99, (2, 200))
    mask = torch.ones_like(ids)
    mask[1, :77] = 0
    arguments = {"attention_mask": mask if padded else None, "use_cache": True}
    truth = eager(ids, **arguments).logits[mask.bool()]
    assert torch.allclose(ours(ids, **arguments).logits[mask.bool()], truth, atol=2e-4)
    backend = RecordingBackend(pattern=FULL, dense_above=2.0)
    out = torch.compile(ours, backend=backend, fullgraph=True)(ids, **arguments)
    assert torch.allclose(out.logits[mask.bool()], truth, atol=2e-4)
    if kind != "llama4_text":
        assert backend.count("minference.sparse_attention") == 2
        biggest = (
            max(
                value.numel()
                for gm in backend.after
                for node in gm.graph.nodes
                if isinstance(value := node.meta.get("example_value"), torch.Tensor)
                and value.dtype == torch.bool
            )
            if padded
            else 0
        )
        assert biggest <= 2 * 200, "an N x N mask was built"


@torch.no_grad()
def test_second_turn_and_decoding_equal_eager():
    ours, eager = tiny("gemma3_text", sliding_window=40)
    ids = torch.randint(0, 99, (1, 260))
    compiled = torch.compile(ours, backend=RecordingBackend(pattern=FULL, dense_above=2.0))
    outs = []
    for model in (compiled, eager):
        first = model(ids[:, :100], use_cache=True)
        second = model(ids[:, 100:250], past_key_values=first.past_key_values, use_cache=True)
        last = model(ids[:, 250:251], past_key_values=second.past_key_values, use_cache=True)
        outs.append(torch.cat([first.logits, second.logits, last.logits], 1))
    assert torch.allclose(outs[0], outs[1], atol=2e-4)


def test_packed_positions_get_their_mask_built():
    """Outside of compilation transformers sees that sequences are packed, and says so."""
    from transformers.masking_utils import (
        causal_mask_function,
        packed_sequence_compatibility_function,
    )

    config = transformers.LlamaConfig()
    config._attn_implementation = "minference"
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    packed = torch.tensor([[0, 0, 0, 1, 1]])
    mask = describe_mask(
        1,
        5,
        5,
        mask_function=packed_sequence_compatibility_function(
            causal_mask_function, positions, packed
        ),
        allow_is_causal_skip=False,
        config=config,
    )
    assert mask.shape == (1, 1, 5, 5)
    assert not mask[0, 0, 4, 2]


def test_image_blocks_get_their_mask_built():
    from transformers.masking_utils import blockwise_overlay, causal_mask_function, or_masks

    blocks = torch.tensor([[-1, 0, 0, 0, -1]])
    mask = describe_mask(
        1,
        5,
        5,
        mask_function=or_masks(causal_mask_function, blockwise_overlay(blocks)),
        allow_is_causal_skip=False,
    )
    assert mask.shape == (1, 1, 5, 5)
    assert mask[0, 0, 1, 3]
