"""Programs compared with what eager makes of them; the patterns select every key."""

from __future__ import annotations

import torch
import torch.nn.functional as F

import mpass

N, H, D = 192, 4, 16
FULL = mpass.VerticalSlash(1, 1 << 20)
BIDIRECTIONAL = mpass.BlockSparse(64)
INF = float("inf")


def causal():
    return torch.ones(N, N, dtype=torch.bool).tril()


def hide(scores):
    return scores.masked_fill(~causal(), -INF)


def operands(heads=H, dim=D):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(1, heads, N, dim, generator=generator) for _ in range(3)]


def compare(
    program,
    *extra,
    pattern=FULL,
    tensors=None,
    tolerance=2e-6,
    capture_scalars=False,
    validate="sample",
):
    """The sites of a program, whose result must be eager's, layout included."""
    arguments = [*(operands() if tensors is None else tensors), *extra]
    options = {"pattern": pattern, "min_seq_len": 16, "dense_above": 2.0, "inner_backend": "eager"}
    options["validate"] = validate
    with (
        torch.no_grad(),
        torch._dynamo.config.patch(capture_scalar_outputs=capture_scalars),
    ):
        expected = program(*arguments)
        out = torch.compile(program, backend="minference", options=options)(*arguments)
    assert (out.shape, out.dtype, out.stride()) == (
        expected.shape,
        expected.dtype,
        expected.stride(),
    )
    assert torch.equal(out.isnan(), expected.isnan())
    if expected.numel():
        assert float((out.double() - expected.double()).abs().nan_to_num().max()) <= tolerance
    return mpass.last_report().sites


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)
