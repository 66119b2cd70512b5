"""repro.py of a debug folder: a program that runs by itself."""

from __future__ import annotations

import contextlib
import io

import pytest
import torch

import mpass
from mpass import debug
from tests.helpers.processes import run_python
from tests.helpers.toys import Decoder, compile_toy

PATTERN = mpass.AShape(16, 64)

pytestmark = pytest.mark.usefixtures("fresh_dynamo", "fresh_debug_warnings")


@torch.no_grad()
def run(options):
    options = {"pattern": PATTERN, "dense_above": 2.0} | options
    torch.manual_seed(1)
    model, x = Decoder(depth=1).eval(), torch.randn(1, 300, 32)
    return compile_toy(model, options)(x)


class Masked(torch.nn.Module):
    """Attention under a mask that is made of token numbers, between two projections."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = torch.nn.Embedding(9, 32), torch.nn.Linear(32, 32)
        self.register_buffer("scale", torch.ones(32))

    def forward(self, tokens, padding):
        x = (self.embed(tokens) * self.scale).view(*tokens.shape, 4, 8).transpose(1, 2)
        n = tokens.shape[1]
        mask = torch.ones(n, n, dtype=torch.bool).tril() & padding[:, None, None, :].bool()
        x = torch.nn.functional.scaled_dot_product_attention(x, x, x, attn_mask=mask)
        return self.out(x.transpose(1, 2).flatten(2))


@torch.no_grad()
def test_the_repro_runs_by_itself_and_attends_as_the_model_did(tmp_path):
    tokens = torch.randint(0, 9, (2, 300))
    padding = torch.ones(2, 300, dtype=torch.long)
    padding[1, :40] = 0
    options = {"debug": tmp_path, "pattern": PATTERN, "dense_above": 2.0}
    compile_toy(Masked().eval(), options, dynamic=True)(tokens, padding)
    folder = tmp_path / "000"
    saved = torch.load(folder / "inputs.pt")
    assert any(torch.equal(each, tokens) for each in saved.values())
    program = (folder / "repro.py").read_text()
    namespace = {"__name__": "repro", "__file__": str(folder / "repro.py")}
    exec(compile(program, "repro.py", "exec"), namespace)
    torch._dynamo.reset()
    with contextlib.redirect_stdout(io.StringIO()) as out:
        namespace["main"]()
    said = out.getvalue()
    assert "1 of 1 attention layer, a_shape" in said
    assert "output 0 (2, 300, 32): largest difference" in said
    (sparse,) = mpass.last_report().sites
    assert (sparse.status, sparse.num_heads, sparse.head_dim) == ("sparse", 4, 8)


def test_the_repro_of_a_decoder_is_a_program_of_its_own(tmp_path):
    run({"debug": tmp_path})
    done = run_python(str(tmp_path / "000" / "repro.py")).stdout
    assert "1 of 1 attention layer" in done and "largest difference" in done


def test_a_graph_that_is_no_program_says_why(tmp_path, monkeypatch):
    def refuse(*_):
        raise debug.NotWritable("it holds a queue")

    monkeypatch.setattr(debug, "make_repro", refuse)
    run({"debug": tmp_path})
    said = (tmp_path / "000" / "repro.py").read_text()
    assert said.startswith("# This graph cannot be written") and "a queue" in said
