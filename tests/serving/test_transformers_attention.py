"""attn_implementation="minference": no mask is built, and the pass gives the same ops."""

from __future__ import annotations

import copy

import pytest
import torch

from mpass.errors import MaskShapeError
from mpass.serving.transformers_attention import (
    attention_forward,
    describe_mask,
    register_attention,
)
from tests.helpers.toys import EVERY_KEY, RecordingBackend

transformers = pytest.importorskip("transformers", reason="needs transformers")


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
    backend = RecordingBackend(pattern=EVERY_KEY, dense_above=2.0)
    out = torch.compile(ours, backend=backend, fullgraph=True)(ids, **arguments)
    assert torch.allclose(out.logits[mask.bool()], truth, atol=2e-4)
    if kind != "llama4_text":
        assert backend.count("minference.sparse_attention") == 2
        biggest = (
            max(
                value.untyped_storage().nbytes()
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
    compiled = torch.compile(ours, backend=RecordingBackend(pattern=EVERY_KEY, dense_above=2.0))
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


def loss_and_gradients(model, ids, mask, **arguments):
    model.zero_grad()
    out = model(ids, attention_mask=mask, **arguments)
    out.logits[mask.bool()].float().square().mean().backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out.logits.detach(), gradients


@pytest.mark.parametrize(("kind", "settings"), [*MODELS, ("gpt_oss", {"sliding_window": 40})])
@pytest.mark.parametrize("batch", [1, 2])
def test_gradients_equal_those_of_eager(kind, settings, batch):
    """With gradients on, words must keep causality, windows, softcap and sinks."""
    ours, eager = tiny(kind, **settings)
    ids = torch.randint(0, 99, (batch, 130))
    mask = torch.ones_like(ids)
    mask[-1, : 33 * (batch - 1)] = 0
    logits, gradients = loss_and_gradients(ours, ids, mask)
    truth, expected = loss_and_gradients(eager, ids, mask)
    assert torch.allclose(logits[mask.bool()], truth[mask.bool()], atol=2e-4)
    assert gradients.keys() == expected.keys()
    for name, gradient in gradients.items():
        assert torch.allclose(gradient, expected[name], atol=1e-4), name


def test_no_token_changes_with_later_ones_under_gradients():
    ours, _ = tiny("llama")
    ids = torch.randint(0, 99, (1, 100))
    changed = ids.clone()
    changed[0, 99] = (ids[0, 99] + 1) % 99
    first, second = (
        ours(i, attention_mask=torch.ones_like(i)).logits[0, :99] for i in (ids, changed)
    )
    assert torch.equal(first, second)


def test_dropout_keeps_the_mask():
    """Dropout of 0.5 zeroes weights, but never shows a later token."""
    ours, _ = tiny("llama", attention_dropout=0.5)
    ours.train()
    ids = torch.randint(0, 99, (1, 100))
    changed = ids.clone()
    changed[0, 99] = (ids[0, 99] + 1) % 99
    outs = []
    for tokens in (ids, changed):
        torch.manual_seed(7)
        outs.append(ours(tokens, attention_mask=torch.ones_like(tokens)).logits[0, :99])
    assert torch.equal(outs[0], outs[1])


@pytest.mark.parametrize(("kind", "settings"), [("gpt_oss", {"sliding_window": 40}), ("llama", {})])
@torch.no_grad()
def test_masks_of_the_user_keep_sinks(kind, settings):
    ours, eager = tiny(kind, **settings)
    ids = torch.randint(0, 99, (1, 100))
    cells = torch.ones(100, 100, dtype=torch.bool).tril()
    cells[50:, 10:20] = False
    mask = torch.zeros(100, 100).masked_fill(~cells, torch.finfo(torch.float32).min)[None, None]
    assert torch.allclose(
        ours(ids, attention_mask=mask).logits, eager(ids, attention_mask=mask).logits, atol=2e-4
    )


@pytest.mark.parametrize("kind", ["llama", "mistral", "gemma3_text", "gpt_oss"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_static_cache_generates_as_eager(kind, padded):
    settings = {} if kind == "llama" else {"sliding_window": 24}
    ours, eager = tiny(kind, **settings)
    ids = torch.randint(1, 99, (2, 40))
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :9] = 0
    tokens = [
        model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=12,
            do_sample=False,
            cache_implementation="static",
            disable_compile=True,
            pad_token_id=0,
        )
        for model in (ours, eager)
    ]
    assert torch.equal(*tokens)


@pytest.mark.parametrize("projection", ["q_proj", "k_proj", "v_proj"])
def test_gradients_into_one_projection(projection):
    """As adapters do: only the values, keys or queries of a frozen model need gradients."""
    ours, eager = tiny("llama")
    ids = torch.randint(0, 99, (1, 80))
    grads = []
    for model in (ours, eager):
        for name, parameter in model.named_parameters():
            parameter.requires_grad = projection in name
        grads.append(loss_and_gradients(model, ids, torch.ones_like(ids))[1])
    assert grads[0].keys() == grads[1].keys() != set()
    for name, gradient in grads[0].items():
        assert torch.allclose(gradient, grads[1][name], atol=1e-4), name


def test_words_about_other_keys_are_refused():
    ours, _ = tiny("llama")
    attention = ours.model.layers[0].self_attn
    query, key = torch.randn(1, 4, 8, 16), torch.randn(1, 2, 8, 16)
    with pytest.raises(MaskShapeError, match=r"layer 0: .* does not describe 8 keys"):
        attention_forward(attention, query, key, key, torch.ones(1, 1, 5, dtype=torch.bool))
