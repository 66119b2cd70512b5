"""rewrite_exported: torch.export's programs become sparse too."""

from __future__ import annotations

import pytest
import torch
from torch.export import Dim, export

import mpass
from mpass.exported import rewrite_exported
from tests.helpers.toys import EVERY_KEY, Attention, Decoder

FULL = {"pattern": EVERY_KEY, "min_seq_len": 128, "dense_above": 2.0}


def targets(program):
    return [str(node.target) for node in program.graph.nodes]


@torch.no_grad()
def test_static_program_becomes_sparse_and_equals_eager():
    model, x = Decoder(depth=2).eval(), torch.randn(1, 256, 32)
    program = export(model, (x,))
    sparse = rewrite_exported(program, FULL)
    assert targets(sparse).count("minference.sparse_attention.default") == 2
    assert "aten.scaled_dot_product_attention.default" in targets(program), "input was edited"
    assert torch.allclose(sparse.module()(x), model(x), atol=1e-5)
    assert [site.path for site in mpass.last_report().sites] == ["layers.0", "layers.1"]


@torch.no_grad()
def test_dynamic_program_compares_the_length_at_run_time():
    model = Decoder(depth=1).eval()
    program = export(
        model, (torch.randn(1, 256, 32),), dynamic_shapes=({1: Dim("n", min=2, max=4096)},)
    )
    sparse = rewrite_exported(program, FULL | {"pattern": mpass.AShape(1, 9)}).module()
    short, long = torch.randn(1, 100, 32), torch.randn(1, 300, 32)
    assert torch.allclose(sparse(short), model(short), atol=1e-5)
    assert not torch.allclose(sparse(long), model(long), atol=1e-4)


@torch.no_grad()
def test_attention_that_is_the_output_itself():
    class Bare(torch.nn.Module):
        def forward(self, q, k, v):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)

    tensors = [torch.randn(1, 2, 200, 16) for _ in range(3)]
    sparse = rewrite_exported(export(Bare(), tuple(tensors)), FULL).module()
    assert torch.allclose(sparse(*tensors), Bare()(*tensors), atol=1e-5)


@torch.no_grad()
def test_exported_program_survives_saving(tmp_path):
    model, x = Attention().eval(), torch.randn(1, 256, 32)
    sparse = rewrite_exported(export(model, (x,)), FULL)
    torch.export.save(sparse, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    assert torch.allclose(loaded(x), model(x), atol=1e-5)


def test_unknown_option_is_refused():
    program = export(Attention().eval(), (torch.randn(1, 8, 32),))
    with pytest.raises(mpass.MpassError, match="unknown option 'patern'"):
        rewrite_exported(program, {"patern": "dense"})
