"""`mpass.compile`: in place, with an early error for what cannot be right."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import mpass
from mpass.errors import (
    ConfigMismatchError,
    ModuleTypeError,
    OptionValueError,
    UnknownOptionError,
    UnknownPatternError,
)


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config).eval()


def test_generate_runs_the_compiled_model():
    model = tiny_llama()
    tokens = torch.randint(0, 64, (1, 128))
    with torch.no_grad():
        wanted = model.generate(tokens, max_new_tokens=2, do_sample=False)
        before = mpass.reports()[-1:]
        same = mpass.compile(model, pattern="dense", min_seq_len=64, inner_backend="eager")
        found = same.generate(tokens, max_new_tokens=2, do_sample=False)
    assert same is model
    assert torch.equal(found, wanted)
    assert mpass.reports()[-1:] != before
    assert len(mpass.last_report().sites) == 2


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"patern": "union"}, UnknownOptionError, "patern"),
        ({"pattern": "unoin"}, UnknownPatternError, "union"),
        ({"min_seq_len": -1}, OptionValueError, "min_seq_len"),
        ({"pattern": mpass.AShape}, OptionValueError, r"AShape\(\)"),
        ({"mode": "fastest"}, OptionValueError, "mode"),
        (
            {"config": mpass.SparseConfig(layers={99: "dense"})},
            ConfigMismatchError,
            "layers 99, the model has 2",
        ),
        (
            {"config": mpass.SparseConfig(layers={1: {7: "dense"}})},
            ConfigMismatchError,
            "layer 1 has 4 query heads",
        ),
        ({"config": mpass.SparseConfig(num_layers=30)}, ConfigMismatchError, "30 layers"),
    ],
)
def test_what_cannot_be_right_is_refused_at_once(options, error, words):
    with pytest.raises(error, match=words):
        mpass.compile(tiny_llama(), **options)


def test_a_function_is_told_where_to_go():
    with pytest.raises(ModuleTypeError, match=r"torch\.compile"):
        mpass.compile(torch.nn.functional.scaled_dot_product_attention)


def test_a_module_without_sizes_is_compiled():
    model = mpass.compile(nn.Linear(4, 4), inner_backend="eager", mode=None)
    assert model(torch.zeros(1, 4)).shape == (1, 4)


def test_a_model_compiled_in_place_is_explained_and_profiled_and_stays_compiled():
    torch._dynamo.reset()
    model = tiny_llama()
    tokens = torch.randint(0, 64, (1, 128))
    options = {"min_seq_len": 64, "pattern": "a_shape(8, 64)", "dense_above": 2.0}
    mpass.compile(model.model, **options, inner_backend="eager")
    kept = model.model._compiled_call_impl
    with torch.no_grad():
        model(tokens)
        explained = mpass.explain(model, tokens, options=options)
        profiled = mpass.profile(model, tokens, options=options)
    assert [site.status for site in explained.sites] == ["sparse", "sparse"]
    assert len(profiled.layers) == 2 and profiled.layers[0].attention_seconds > 0
    assert model.model._compiled_call_impl is kept
