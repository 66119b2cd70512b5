"""`options={"linear": ...}`: which linear layers of a graph multiply other numbers."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing._internal.two_tensor import TwoTensor

import mpass
from mpass.backend import minference
from mpass.errors import OptionValueError
from mpass.lowering.cpu import linear_rates
from mpass.lowering.cpu.cost_model import LinearConstants
from mpass.lowering.cpu.linear import linear_reason
from mpass.lowering.cpu.linear_half import half_linear_reason

pytestmark = pytest.mark.skipif(
    bool(linear_reason(torch.float32)), reason=linear_reason(torch.float32) or "there are products"
)

NO_HALF = half_linear_reason(torch.bfloat16)
needs_half = pytest.mark.skipif(bool(NO_HALF), reason=NO_HALF or "it multiplies them")


def compiled(program, **options):
    """The program with linear layers in 8 bits, and what its report says of them."""
    torch._dynamo.reset()
    chosen = {"linear": "int8", "inner_backend": "eager", **options}
    run = torch.compile(program, backend="minference", options=chosen)

    def call(*args, **kwargs):
        out = run(*args, **kwargs)
        return out, mpass.reports()[-1].notes

    return call


class Layer(nn.Module):
    """Two layers that read x [B, N, 64], one that reads their product."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.gate = nn.Linear(64, 128, dtype=dtype)
        self.up = nn.Linear(64, 128, bias=False, dtype=dtype)
        self.down = nn.Linear(128, 64, dtype=dtype)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_layers_multiply_in_8_bits(dtype, inner):
    layer, x = Layer(dtype), torch.randn(2, 100, 64).to(dtype)
    out, notes = compiled(layer, inner_backend=inner)(x)
    assert notes == ("3 of 3 linear layers in 8 bits",)
    wanted = layer(x)
    assert out.dtype == dtype
    error = (out - wanted).float().norm() / wanted.float().norm()
    assert 1e-4 < error < 0.03


@torch.no_grad()
def test_layers_of_one_input_share_its_levels_unless_it_is_written_to():
    weight = nn.Parameter(torch.randn(64, 64))

    class Program(nn.Module):
        def __init__(self, writes):
            super().__init__()
            self.weight, self.writes = weight, writes

        def forward(self, x):
            x = x * 1
            first = F.linear(x, self.weight)
            if self.writes:
                x.mul_(-2)
            return first, F.linear(input=x, weight=self.weight)

    graphs = []

    def keep(gm, inputs, **options):
        run = minference(gm, inputs, options={"linear": "int8", "inner_backend": "eager"})
        graphs.append(gm)
        return run

    x = torch.randn(1, 200, 64)
    for writes, rounded in ((False, 1), (True, 2)):
        torch._dynamo.reset()
        first, second = torch.compile(Program(writes), backend=keep)(x)
        targets = [node.target for node in graphs[-1].graph.nodes]
        assert targets.count(torch.ops.minference.quantize_rows.default) == rounded
        assert torch.allclose(second, first * (-2 if writes else 1), atol=0.3)


class Odd(nn.Module):
    """Layers that keep their products, one kind each."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        inputs, outputs = {"width": (65, 64), "logits": (64, 64 * 9)}.get(kind, (64, 64))
        weight = torch.randn(outputs, inputs)
        if kind == "subclass":  # as weights are that torchao has quantised
            weight = TwoTensor(weight, weight.clone())
        self.weight = nn.Parameter(weight, requires_grad=kind == "gradients")

    def forward(self, x):
        weight = self.weight
        if self.kind == "computed":
            weight = weight + 1
        if self.kind == "written":
            weight.data.mul_(1.5)
        if self.kind == "autocast":
            with torch.autocast("cpu", torch.bfloat16):
                return F.linear(x, weight).float()
        return F.linear(x, weight)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("width", "the number of inputs is no multiple of 64"),
        ("logits", "makes logits"),
        ("computed", "the weight is no parameter"),
        ("autocast", "autocast chooses the dtype"),
        ("gradients", "gradients are recorded"),
        ("subclass", "a tensor of another class multiplies in its own way"),
        ("short", "fewer than 128 rows"),
        ("float64", "linear layers in 8 bits are for float32, bfloat16, float16, not float64"),
    ],
)
def test_other_layers_keep_their_products(kind, reason):
    program = Odd(kind)
    x = torch.randn(1, 5 if kind == "short" else 200, 65 if kind == "width" else 64)
    if kind == "float64":
        program, x = program.double(), x.double()
    with torch.set_grad_enabled(kind == "gradients"):
        out, notes = compiled(program)(x)
        assert torch.equal(out, program(x))
    assert notes == (f"0 of 1 linear layers in 8 bits (1 not: {reason})",)


@torch.no_grad()
def test_a_weight_that_the_program_writes_to_keeps_its_products():
    program, x = Odd("written"), torch.randn(1, 200, 64)
    wanted = F.linear(x, program.weight * 1.5)
    out, _ = compiled(program)(x)
    assert torch.allclose(out, wanted, atol=1e-4)


@torch.no_grad()
def test_new_weights_are_used_without_compiling_again():
    layer, x = Layer(), torch.randn(1, 200, 64)
    run = compiled(layer)
    run(x)
    layer.load_state_dict({name: value * 0.5 for name, value in layer.state_dict().items()})
    out, _ = run(x)
    assert (out - layer(x)).norm() < 0.03 * layer(x).norm()


@torch.no_grad()
def test_a_model_says_once_what_its_linear_layers_do():
    torch._dynamo.reset()
    layer = Layer()
    mpass.compile(layer, linear="int8", inner_backend="eager")
    layer(torch.randn(1, 200, 64))
    layer(torch.randn(1, 1, 64))
    assert "3 of 3 linear layers in 8 bits" in str(mpass.last_report())
    assert "0 of 3" not in str(mpass.last_report())


@torch.no_grad()
def test_passes_of_other_packages_keep_every_product():
    from torch._inductor import config

    layer, x = Layer(), torch.randn(1, 200, 64)
    with config.patch(joint_custom_post_pass=lambda graph: None):
        out, notes = compiled(layer)(x)
    assert torch.equal(out, layer(x))
    assert notes == ("0 of 3 linear layers in 8 bits: another package edits graphs later",)


def test_backends_of_other_packages_are_refused():
    for linear in ("fp32", "half", "int8"):
        with pytest.raises(OptionValueError, match="None with another package's inner_backend"):
            mpass.compile(Layer(), linear=linear, inner_backend="cudagraphs")


def test_another_word_is_refused():
    with pytest.raises(OptionValueError, match="'auto', 'fp32', 'half', 'int8' or None"):
        mpass.compile(Layer(), linear="int4")


@needs_half
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_layers_multiply_in_half_precision_where_that_is_asked(inner, dtype):
    layer, x = Layer(dtype), torch.randn(2, 100, 64).to(dtype)
    out, notes = compiled(layer, linear="half", inner_backend=inner)(x)
    assert notes == ("3 of 3 linear layers in half precision",)
    wanted = Layer(dtype).double()(x.double())
    assert out.dtype == dtype and not torch.equal(out, layer(x))
    assert (out.double() - wanted).norm() < 0.01 * wanted.norm()


@needs_half
@torch.no_grad()
def test_layers_that_are_not_halved_keep_their_products_and_say_why():
    layer, x = Layer(), torch.randn(1, 200, 64)
    out, notes = compiled(layer, linear="half")(x)
    (note,) = notes
    assert note.startswith("0 of 3 linear layers in half precision (3 not: ")
    assert "for bfloat16 and float16, not float32" in note
    assert torch.equal(out, layer(x))
    layer, x = Layer(torch.bfloat16), torch.randn(1, 5, 64).bfloat16()
    out, notes = compiled(layer, linear="half")(x)
    assert notes == ("0 of 3 linear layers in half precision (3 not: fewer than 128 rows)",)


@torch.no_grad()
def test_a_machine_without_half_precision_takes_what_is_fastest_else(monkeypatch, fp32_pays):
    from mpass.lowering.cpu import linear_half

    monkeypatch.setattr(linear_half, "half_linear_reason", lambda dtype: "no such instructions")
    _, notes = compiled(Layer(torch.bfloat16), linear="half")(torch.randn(2, 100, 64).bfloat16())
    assert notes == (
        "0 of 3 linear layers in half precision (3 not: no such instructions)",
        "3 of 3 linear layers of bf16 multiply in fp32, faster here",
    )


@pytest.fixture
def fp32_pays(monkeypatch):
    """A processor that is fastest in fp32 with numbers of bf16, whatever this one is."""
    found = LinearConstants(bf16=2.0, fp32=1.0, half=0.0)
    monkeypatch.setattr(linear_rates, "linear_constants", lambda dtype: only_bf16(dtype, found))


@pytest.fixture
def half_pays(monkeypatch):
    """A processor that is fastest in half precision with numbers of bf16."""
    found = LinearConstants(bf16=2.0, fp32=1.0, half=0.7)
    monkeypatch.setattr(linear_rates, "linear_constants", lambda dtype: only_bf16(dtype, found))


def only_bf16(dtype, constants):
    return constants if dtype == torch.bfloat16 else None


IN_HALF = (
    "3 of 3 linear layers of bf16 multiply in half precision, fastest here "
    "(linear='fp32' has none that rounds a product)"
)
IN_FP32 = "3 of 3 linear layers of bf16 multiply in fp32, faster here"


@needs_half
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_layers_of_bf16_multiply_in_half_precision_where_that_is_fastest(inner, half_pays):
    layer, x = Layer(torch.bfloat16), torch.randn(2, 100, 64).bfloat16()
    out, notes = compiled(layer, linear="auto", inner_backend=inner)(x)
    assert notes == (IN_HALF,)
    asked, _ = compiled(layer, linear="half", inner_backend=inner)(x)
    assert torch.equal(out, asked)
    wanted = Layer(torch.bfloat16).double()(x.double())
    own = (layer(x).double() - wanted).norm()
    assert (out.double() - wanted).norm() <= 1.1 * own


@torch.no_grad()
def test_fp32_rounds_no_product_where_half_precision_is_fastest(half_pays):
    layer, x = Layer(torch.bfloat16), torch.randn(2, 100, 64).bfloat16()
    _, notes = compiled(layer, linear="fp32")(x)
    assert notes == (IN_FP32,)


@torch.no_grad()
def test_who_forbids_reduced_sums_of_bf16_gets_none(half_pays, monkeypatch):
    layer, x = Layer(torch.bfloat16), torch.randn(2, 100, 64).bfloat16()
    matmul = torch.backends.cuda.matmul
    monkeypatch.setattr(matmul, "allow_bf16_reduced_precision_reduction", False)
    _, notes = compiled(layer, linear="auto")(x)
    assert notes == (IN_FP32,)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@torch.no_grad()
def test_other_dtypes_are_not_halved_unless_asked(dtype, half_pays):
    layer, x = Layer(dtype), torch.randn(1, 200, 64).to(dtype)
    out, notes = compiled(layer, linear="auto")(x)
    assert not notes
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@torch.no_grad()
def test_layers_of_bf16_multiply_in_fp32_where_that_is_faster(inner, fp32_pays):
    layer, x = Layer(torch.bfloat16), torch.randn(2, 100, 64).bfloat16()
    out, notes = compiled(layer, linear="auto", inner_backend=inner)(x)
    assert notes == (IN_FP32,)
    wanted = layer.double()(x.double())
    assert out.dtype == torch.bfloat16
    own = (Layer(torch.bfloat16)(x).double() - wanted).norm()
    assert (out.double() - wanted).norm() <= 1.05 * own  # no more than bf16 products lose


@pytest.mark.parametrize(
    ("dtype", "options"),
    [
        (torch.float32, {"linear": "auto"}),
        (torch.bfloat16, {"linear": None}),
        (torch.bfloat16, {"linear": "auto", "inner_backend": "cudagraphs"}),
    ],
)
@torch.no_grad()
def test_layers_are_left_alone_otherwise(dtype, options, half_pays):
    layer, x = Layer(dtype), torch.randn(1, 200, 64).to(dtype)
    out, notes = compiled(layer, **options)(x)
    assert not notes
    assert torch.equal(out, layer(x))


@pytest.mark.parametrize("kind", ["computed", "autocast", "gradients", "subclass", "short"])
def test_layers_that_must_stay_are_not_changed_unasked(kind, half_pays):
    program, x = Odd(kind), torch.randn(1, 5 if kind == "short" else 200, 64)
    if kind not in ("autocast", "subclass"):
        program, x = program.bfloat16(), x.bfloat16()
    with torch.set_grad_enabled(kind == "gradients"):
        out, notes = compiled(program, linear="auto")(x)
        assert torch.equal(out, program(x))
    assert not notes


@torch.no_grad()
def test_one_graph_serves_prompts_and_single_tokens_in_fp32(fp32_pays):
    layer = Layer(torch.bfloat16)
    run = torch.compile(
        layer, backend="minference", options={"inner_backend": "eager"}, dynamic=True
    )
    for rows in (200, 3, 300):
        x = torch.randn(1, rows, 64).bfloat16()
        assert torch.allclose(run(x), layer(x), atol=0.02)
