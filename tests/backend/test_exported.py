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


class Masked(torch.nn.Module):
    """Causal attention over padded prompts; the key mask is no tensor of the program."""

    def forward(self, q, k, v, kept):
        seen = torch.arange(q.shape[2])[:, None] >= torch.arange(k.shape[2])
        mask = seen & (kept[:, None, None, :] > 0)
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)


@pytest.mark.parametrize("dynamic", [False, True])
@torch.no_grad()
def test_a_key_mask_that_is_made_holds_registered_ops_only(dynamic):
    n = Dim("n", min=2, max=4096)
    shapes = ({2: n}, {2: n}, {2: n}, {1: n}) if dynamic else None
    q, k, v = (torch.randn(2, 4, 192, 16) for _ in range(3))
    kept = (torch.arange(192) >= torch.tensor([[0], [10]])).long()
    sparse = rewrite_exported(export(Masked(), (q, k, v, kept), dynamic_shapes=shapes), FULL)
    assert targets(sparse).count("minference.sparse_attention.default") == 1
    difference = sparse.module()(q, k, v, kept) - Masked()(q, k, v, kept)
    assert difference.nan_to_num().abs().max() < 1e-5


def test_a_program_that_may_be_trained_stays_dense():
    model, x = Attention().eval(), torch.randn(1, 256, 32)
    dense = rewrite_exported(export(model, (x,)), FULL)
    assert "gradients are recorded" in mpass.last_report().sites[0].reason
    dense.module()(x).sum().backward()
    rewrite_exported(export(model.requires_grad_(False), (x,)), FULL)
    assert mpass.last_report().sites[0].status == "sparse"


@mpass.configure(pattern=mpass.AShape(1, 9))
class Decorated(torch.nn.Module):
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Outer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = Decorated()

    def forward(self, q, k, v):
        return self.inner(q, k, v)


class DecoratedForward(torch.nn.Module):
    @mpass.configure(pattern=mpass.AShape(1, 9))
    def forward(self, q, k, v):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


class Region(torch.nn.Module):
    def forward(self, q, k, v):
        with mpass.configure(pattern=mpass.AShape(1, 9)):
            return torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("model", [Decorated, Outer, DecoratedForward, Region])
@torch.no_grad()
def test_decorators_are_heard_with_and_without_dynamo(model, strict):
    tensors = tuple(torch.randn(1, 2, 200, 16) for _ in range(3))
    rewrite_exported(export(model(), tensors, strict=strict), FULL)
    (site,) = mpass.last_report().sites
    assert site.patterns == ("a_shape(1, 9)",) * 2
