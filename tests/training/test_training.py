"""`options={"training": "sparse"}`: models are trained through sparse attention."""

from __future__ import annotations

import copy
import dataclasses
import functools

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import mpass
from mpass.errors import OptionValueError
from mpass.lowering import dispatch

OPTIONS = {"min_seq_len": 1, "dense_above": 1.0, "training": "sparse"}
EVERY_KEY = {**OPTIONS, "pattern": "block_sparse(99)"}


class Block(nn.Module):
    """Causal attention with grouped heads, and a residual."""

    def __init__(self, dim: int = 128, heads: int = 2, kv_heads: int = 1, p: float = 0.0) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.p = heads, kv_heads, p
        self.q = nn.Linear(dim, dim, bias=False)
        self.kv = nn.Linear(dim, 2 * dim * kv_heads // heads, bias=False)
        self.out = nn.Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        batch, length, dim = x.shape
        query = self.q(x).view(batch, length, self.heads, -1).transpose(1, 2)
        key, value = self.kv(x).view(batch, length, 2, self.kv_heads, -1).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            *(query, key, value, mask, self.p), is_causal=mask is None, enable_gqa=True
        )
        return x + self.out(attended.transpose(1, 2).reshape(batch, length, dim))


class Model(nn.Module):
    """Two blocks; `checkpoints`: each is recomputed in the backward pass."""

    def __init__(self, checkpoints: bool = False, p: float = 0.0) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(p=p), Block(p=p)])
        self.checkpoints = checkpoints

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        for block in self.blocks:
            if self.checkpoints:
                x = checkpoint(block, x, mask, use_reentrant=False)
            else:
                x = block(x, mask)
        return x


def gradients(model: nn.Module, *inputs: Tensor) -> list[Tensor]:
    """Of all parameters, of a loss that weighs every output differently."""
    out = model(*inputs)
    weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
    return list(torch.autograd.grad((out * weights).sum(), list(model.parameters())))


def compiled(model: nn.Module, **options: object) -> nn.Module:
    torch._dynamo.reset()
    found = copy.deepcopy(model)
    found.compile(backend="minference", options=options)
    return found


def assert_close(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-5) -> None:
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager", "inductor"])
def test_a_model_that_selects_every_key_has_the_gradients_of_dense_attention(inner_backend):
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 150, 128)
    expected = gradients(model.double(), x.double())
    model.float()
    found = gradients(compiled(model, **EVERY_KEY, inner_backend=inner_backend), x)
    assert_close(found, [g.float() for g in expected])
    report = mpass.last_report()
    assert [site.training for site in report.sites] == [True, True]
    assert "; training" in report.summary()
    assert "sparse, training" in str(report)


def test_without_gradients_the_op_has_no_backward():
    model, x = Model(), torch.randn(1, 150, 128)
    with torch.no_grad():
        compiled(model, **EVERY_KEY, inner_backend="eager")(x)
    assert not any(site.training for site in mpass.last_report().sparse_sites)


@pytest.mark.parametrize("inner_backend", ["aot_eager", "inductor"])
def test_a_checkpoint_recomputes_the_very_same_keys(inner_backend, monkeypatch):
    """Estimated again in the backward pass, bit for bit; and the gradients are the same."""
    from mpass.lowering import training_ops

    torch.manual_seed(0)
    x = torch.randn(1, 400, 128)
    seen = []
    attend = training_ops.attend

    def noting(call, computation):
        seen.append([t.clone() for t in (call.inputs.query, *call.index.tensors())])
        return attend(call, computation)

    monkeypatch.setattr(training_ops, "attend", noting)
    options = {**OPTIONS, "pattern": "vertical_slash(16, 64)", "inner_backend": inner_backend}
    model = Model()
    plain = gradients(compiled(model, **options), x)
    assert len(seen) == 2
    seen.clear()
    model.checkpoints = True
    again = gradients(compiled(model, **options), x)
    assert len(seen) == 4
    assert mpass.last_report().sparse_sites
    first = {float(call[0].sum()): call for call in seen[:2]}
    for call in seen[2:]:
        for one, other in zip(call, first[float(call[0].sum())], strict=True):
            assert torch.equal(one, other)
    for one, other in zip(again, plain, strict=True):
        assert torch.equal(one, other)


def test_a_padding_mask_a_chunk_of_keys_and_autocast_have_gradients():
    torch.manual_seed(0)
    model, x = Model(), torch.randn(2, 150, 128)
    real = torch.ones(2, 150, dtype=torch.bool)
    real[1, 100:] = False

    def run(model: nn.Module) -> list[Tensor]:
        with torch.autocast("cpu", torch.bfloat16):
            mask = real[:, None, None, :] & torch.ones(150, 150, dtype=torch.bool).tril()
            return gradients(model, x, mask)

    class Masked(nn.Module):
        def __init__(self, model: Model) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor, real: Tensor) -> Tensor:
            mask = real[:, None, None, :] & torch.ones(150, 150, dtype=torch.bool).tril()
            return self.model(x, mask)

    with torch.autocast("cpu", torch.bfloat16):
        found = gradients(compiled(Masked(model), **EVERY_KEY, inner_backend="aot_eager"), x, real)
    assert all(site.training for site in mpass.last_report().sites)
    assert_close(found, run(model), 2e-2)


@pytest.mark.parametrize("accumulated", [1, 3])
def test_two_steps_of_training_equal_dense_steps(accumulated):
    """With an optimiser, and gradients summed up over several batches."""
    torch.manual_seed(0)
    model = Model()
    losses = []
    for net in (copy.deepcopy(model), compiled(model, **EVERY_KEY, inner_backend="aot_eager")):
        optimiser = torch.optim.AdamW(net.parameters(), lr=1e-2)
        torch.manual_seed(1)
        losses.append([])
        for _ in range(2):
            for _ in range(accumulated):
                loss = net(torch.randn(1, 130, 128)).square().mean() / accumulated
                loss.backward()
                losses[-1].append(float(loss.detach()))
            optimiser.step()
            optimiser.zero_grad()
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_lengths_may_be_symbols():
    torch.manual_seed(0)
    model = Model()
    sparse = compiled(model, **EVERY_KEY, inner_backend="aot_eager")
    for length in (130, 190, 260):
        x = torch.randn(1, length, 128)
        assert_close(gradients(sparse, x), gradients(model, x))
    assert len(mpass.reports()) and mpass.last_report().sites[0].training


def dense_reason(model: nn.Module, *inputs: Tensor, **options: object) -> str:
    expected = gradients(model, *inputs)
    found = gradients(compiled(model, **{**EVERY_KEY, "inner_backend": "eager"} | options), *inputs)
    assert_close(found, expected)
    return mpass.last_report().sites[0].reason


def test_training_is_dense_unless_it_is_asked_for():
    reason = dense_reason(Model(), torch.randn(1, 150, 128), training="dense")
    assert reason.startswith("gradients are recorded")


def test_what_has_no_backward_stays_dense():
    x = torch.randn(1, 150, 128)
    assert "read at run time" in dense_reason(Model(), x, torch.ones(150, 150).tril().bool())


def test_dropout_stays_dense():
    torch._dynamo.reset()
    compiled(Model(p=0.1), **EVERY_KEY, inner_backend="eager")(torch.randn(1, 150, 128))
    assert "dropout p=0.1" in mpass.last_report().sites[0].reason


def test_a_gradient_by_torch_func_stays_dense():
    block, x = Block(), torch.randn(1, 150, 128)

    def gradient(x: Tensor) -> Tensor:
        return torch.func.grad(lambda x: block(x).square().sum())(x)

    torch._dynamo.reset()
    options = {**EVERY_KEY, "inner_backend": "eager"}
    found = torch.compile(gradient, backend="minference", options=options)(x)
    assert torch.allclose(found, gradient(x), atol=1e-5)
    assert "torch.func" in mpass.last_report().sites[0].reason


def test_training_is_checked():
    with pytest.raises(OptionValueError, match="training"):
        mpass.compile(Model(), training="both")


class Checkpointed(nn.Module):
    """A block in a checkpoint that chooses itself what it recomputes."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: Tensor) -> Tensor:
        kept = functools.partial(create_selective_checkpoint_contexts, [torch.ops.aten.mm.default])
        return checkpoint(self.block, x, use_reentrant=False, context_fn=kept)


def test_a_checkpoint_that_chooses_what_it_recomputes_stays_dense():
    model, x = Checkpointed(), torch.randn(1, 150, 128)
    expected = gradients(model, x)
    options = {**EVERY_KEY, "inner_backend": "aot_eager"}
    assert_close(gradients(compiled(model, **options), x), expected)
    assert "context_fn" in mpass.last_report().sites[0].reason


def test_a_device_without_backward_kernels_stays_dense(monkeypatch):
    lowering = dataclasses.replace(dispatch.device_lowering("cpu"), attention_backward=None)
    monkeypatch.setattr(dispatch, "_added", {"cpu": lowering})
    assert "no backward kernels" in dense_reason(Model(), torch.randn(1, 150, 128))


class Rows(nn.Module):
    """Attention without causality, where a batch row may have no key at all."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 64)

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        heads = self.project(x)[:, None]
        scores = (heads @ heads.mT / 8).masked_fill(~real[:, None, None, :], -1e9)
        return scores.softmax(-1) @ heads


def test_rows_without_a_key_keep_a_mean_dense():
    x, real = torch.randn(2, 150, 64), torch.ones(2, 150, dtype=torch.bool)
    real[1] = False
    assert "get a mean" in dense_reason(Rows(), x, real)


class Biased(nn.Module):
    """Causal attention to whose scores a number per key is added."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(64, 16)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        heads = self.project(x)[:, None]
        causal = torch.ones(150, 150, dtype=torch.bool).tril()
        scores = (heads @ heads.mT / 4 + bias).masked_fill(~causal, -torch.inf)
        return scores.softmax(-1) @ heads


@pytest.mark.parametrize("inner_backend", ["eager", "aot_eager"])
def test_a_bias_per_key_has_gradients(inner_backend):
    model, x = Biased(), torch.randn(2, 150, 64)
    bias = torch.randn(1, 1, 1, 150, requires_grad=True)
    sparse = compiled(model, **EVERY_KEY, inner_backend=inner_backend)

    def found(net: nn.Module) -> list[Tensor]:
        out = net(x, bias)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape)
        return list(torch.autograd.grad((out * weights).sum(), [bias, *net.parameters()]))

    assert_close(found(sparse), found(model))
    assert mpass.last_report().sites[0].training
