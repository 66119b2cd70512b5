"""nn.MultiheadAttention and torch's Transformer layers: the op that projects is taken apart."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import mpass
from mpass import failures
from mpass.backend import minference
from mpass.graph.layouts import same_layout
from tests.helpers.toys import OPTIONS

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

N, E, H = 192, 32, 4
FULL = {**OPTIONS, "pattern": mpass.BlockSparse(1 << 20)}
"""Every key is selected, in attention that is not causal as well."""


def hidden(rows: int = N, keys: int = N) -> torch.Tensor:
    """What causality hides, as a truth mask of torch's modules."""
    return torch.ones(rows, keys, dtype=torch.bool).triu(1)


def hidden_float(rows: int = N, keys: int = N) -> torch.Tensor:
    return torch.full((rows, keys), float("-inf")).triu(1)


def padding(batch: int) -> torch.Tensor:
    """Nothing is hidden in the first row, the end of the second and later ones is."""
    mask = torch.zeros(batch, N, dtype=torch.bool)
    mask[1:, -9:] = True
    return mask


def module(**settings) -> nn.MultiheadAttention:
    torch.manual_seed(0)
    made = nn.MultiheadAttention(E, H, **settings).eval()
    for bias in (made.in_proj_bias, made.out_proj.bias):
        if bias is not None:
            nn.init.normal_(bias)
    return made


def check(program, *inputs, status="sparse", count=1, plain=False, tolerance=1e-5) -> None:
    """Compare a program with eager, or with what Dynamo makes of it if `plain`."""
    with torch.no_grad():
        expected = (torch.compile(program, backend="eager") if plain else program)(*inputs)
        torch._dynamo.reset()
        result = torch.compile(program, backend="minference", options=FULL)(*inputs)
    torch.testing.assert_close(result, expected, atol=tolerance, rtol=0, equal_nan=True)
    assert same_layout(expected, result)
    sites = mpass.last_report().sites
    assert [site.status for site in sites] == [status] * count, sites
    assert {site.spelling for site in sites} == {"mha"}
    assert all(site.source.startswith(__file__) for site in sites)


MASKS = {
    "none": lambda batch: {},
    "truth": lambda batch: {"attn_mask": hidden()},
    "float": lambda batch: {"attn_mask": hidden_float()},
    "hint": lambda batch: {"attn_mask": hidden_float(), "is_causal": True},
    "padding": lambda batch: {"key_padding_mask": padding(batch)},
    "both": lambda batch: {
        "attn_mask": hidden(),
        "key_padding_mask": padding(batch),
        "is_causal": True,
    },
    "every head": lambda batch: {"attn_mask": hidden().expand(batch * H, -1, -1)},
}


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("mask", MASKS)
def test_self_attention_of_the_module_is_eagers(mask, batch_first, batch):
    attention = module(batch_first=batch_first)
    x = torch.randn((batch, N, E) if batch_first else (N, batch, E))
    check(lambda x: attention(x, x, x, need_weights=False, **MASKS[mask](batch))[0], x)


@pytest.mark.parametrize("mask", MASKS)
def test_masks_of_the_function_itself(mask):
    attention = module()

    def program(x):
        return F.multi_head_attention_forward(
            *(x, x, x, E, H, attention.in_proj_weight, attention.in_proj_bias, None, None),
            *(False, 0.5, attention.out_proj.weight, attention.out_proj.bias),
            training=False,
            need_weights=False,
            **MASKS[mask](2),
        )[0]

    check(program, torch.randn(N, 2, E))


@pytest.mark.parametrize(("first", "second"), [("float", "padding"), ("truth", "float padding")])
def test_masks_of_two_types_are_added(first, second):
    attention = module()
    pad = torch.zeros(2, N).masked_fill(padding(2), float("-inf"))
    given = {"attn_mask": hidden_float() if first == "float" else hidden()}
    given["key_padding_mask"] = padding(2) if second == "padding" else pad

    def program(x, mask, pad):
        return F.multi_head_attention_forward(
            *(x, x, x, E, H, attention.in_proj_weight, attention.in_proj_bias, None, None),
            *(False, 0.0, attention.out_proj.weight, attention.out_proj.bias),
            need_weights=False,
            attn_mask=mask,
            key_padding_mask=pad,
        )[0]

    check(program, torch.randn(N, 2, E), given["attn_mask"], given["key_padding_mask"])


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("settings", [{}, {"kdim": 24, "vdim": 40}, {"bias": False}], ids=str)
def test_cross_attention_with_keys_and_values_of_their_own(settings, batch):
    attention = module(batch_first=True, **settings)
    key = torch.randn(batch, N + 9, settings.get("kdim", E))
    value = torch.randn(batch, N + 9, settings.get("vdim", E))
    program = lambda *x: attention(*x, need_weights=False)[0]  # noqa: E731
    check(program, torch.randn(batch, N, E), key, value)


def test_input_without_a_batch():
    attention = module()
    x = torch.randn(N, E)
    pad = padding(2)[1]
    check(lambda x, p: attention(x, x, x, key_padding_mask=p, need_weights=False)[0], x, pad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_its_dtype(dtype):
    attention = module(batch_first=True).to(dtype)
    x = torch.randn(2, N, E).to(dtype)
    program = lambda x: attention(x, x, x, attn_mask=hidden(), need_weights=False)[0]  # noqa: E731
    check(program, x, tolerance=0.02)


def test_one_graph_serves_all_lengths():
    attention = module(batch_first=True)

    def program(x):
        return attention(x, x, x, attn_mask=hidden(x.shape[1], x.shape[1]), need_weights=False)[0]

    compiled = torch.compile(program, backend="minference", options=FULL, dynamic=True)
    with torch.no_grad():
        for batch, length in ((2, N), (3, N + 64), (5, N + 3)):
            x = torch.randn(batch, length, E)
            torch.testing.assert_close(compiled(x), program(x), atol=1e-5, rtol=0)
    assert mpass.last_report().sites[0].status == "sparse"
    assert mpass.last_report().graphs == 1


def layer(**settings) -> nn.TransformerEncoderLayer:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(E, H, 48, batch_first=True, **settings).eval()


@pytest.mark.parametrize("settings", [{}, {"norm_first": True, "activation": "gelu"}], ids=str)
@pytest.mark.parametrize("mask", ["none", "causal", "padding"])
def test_encoder_layer_of_the_fast_path(settings, mask):
    encoder = layer(**settings)
    x = torch.randn(3, N, E)
    if mask == "causal":
        check(lambda x: encoder(x, hidden(), is_causal=True), x)
    else:
        check(lambda x: encoder(x, src_key_padding_mask=padding(3) if mask != "none" else None), x)


def test_rows_without_any_key_stay_nan_in_the_fast_path():
    encoder = layer()
    pad = padding(2)
    pad[1] = True
    check(lambda x, p: encoder(x, src_key_padding_mask=p), torch.randn(2, N, E), pad, plain=True)
    both = lambda x, p: encoder(x, hidden(), p)  # noqa: E731
    check(both, torch.randn(2, N, E), pad, plain=True, status="dense")
    assert "set_fastpath_enabled(False)" in mpass.last_report().sites[0].reason


@pytest.mark.parametrize("empty", [False, True], ids=["causal", "a row without a key"])
def test_a_mask_from_outside_is_read_at_run_time_in_the_fast_path(empty):
    encoder = layer()
    mask = hidden()
    if empty:
        mask[5] = True
    check(lambda x, m: encoder(x, m), torch.randn(2, N, E), mask, plain=True)
    assert any("run time" in line for line in mpass.last_report().sites[0].mask)


@pytest.mark.parametrize("mask_type", [0, 1, 2])
def test_the_op_of_the_fast_path_by_itself(mask_type):
    attention = module()
    weights = (attention.in_proj_weight, attention.in_proj_bias)
    weights = (*weights, attention.out_proj.weight, attention.out_proj.bias)

    def program(x, y, pad):
        masks = (hidden(), pad, hidden()[None, None].expand(2, H, -1, -1))
        return torch._native_multi_head_attention(
            *(x, y, y, E, H, *weights, masks[mask_type], False), mask_type=mask_type
        )[0]

    check(lambda x, pad: program(x, x, pad), torch.randn(2, N, E), padding(2))


def test_stacks_of_layers_and_decoders():
    torch.manual_seed(0)
    model = nn.Transformer(E, H, 2, 1, 48, batch_first=True).eval()
    mask = nn.Transformer.generate_square_subsequent_mask
    source, target = torch.randn(2, N + 16, E), torch.randn(2, N, E)
    program = lambda s, t: model(s, t, tgt_mask=mask(N), tgt_is_causal=True)  # noqa: E731
    check(program, source, target, count=4)
    paths = [site.path for site in mpass.last_report().sites]
    assert len(set(paths)) == 4
    assert "model.decoder.layers.0.multihead_attn" in paths


@pytest.mark.parametrize(("mask", "status"), [(hidden_float, "sparse"), (hidden, "dense")])
def test_attention_inside_of_a_checkpoint(mask, status):
    attention = module(batch_first=True)

    def program(x):
        inner = lambda x: attention(x, x, x, attn_mask=mask(), need_weights=False)[0]  # noqa: E731
        return checkpoint(inner, x, use_reentrant=False)

    check(program, torch.randn(2, N, E), status=status)
    # The module turns a truth mask into numbers in place.
    reason = "" if status == "sparse" else "the sub-graph writes in place"
    assert mpass.last_report().sites[0].reason == reason


def codes_of(program, x, grad=False, **options) -> tuple[str, str]:
    """The code of a program's graph before and after our passes."""
    codes: list[str] = []

    def backend(gm, inputs):
        codes.append(gm.code)
        minference(gm, inputs, options={**FULL, **options})
        codes.append(gm.code)
        gm.recompile()
        assert gm.code == codes[-1]
        return gm.forward

    with torch.set_grad_enabled(grad):
        torch.compile(program, backend=backend)(x)
    before, after = codes
    return before, after


def with_weights(x, attention):
    return attention(x, x, x)


def biased(x, attention):
    mask = x[:, 0, :1] * x[:, 0, :1].mT
    return attention(x, x, x, attn_mask=mask, need_weights=False)


def short(x, attention):
    return attention(x[:50], x[:50], x[:50], attn_mask=hidden(50, 50), need_weights=False)


def left_open(x, attention):
    return attention(x, x, x, need_weights=False)


DENSE = {
    "weights": (with_weights, {}, "pass need_weights=False"),
    "zeros": (left_open, {"add_zero_attn": True}, "add_zero_attn"),
    "learned key": (left_open, {"add_bias_kv": True}, "add_bias_kv"),
    "bias": (biased, {}, "not known to be a mask"),
    "length": (short, {}, "50 keys"),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_call_that_stays_dense_is_left_as_it_was(name):
    program, settings, words = DENSE[name]
    attention = module(**settings)
    x = torch.randn(N, 2, E)
    before, after = codes_of(lambda x: program(x, attention)[0], x, read_masks=False)
    assert after == before
    (site,) = mpass.last_report().sites
    assert words in site.reason
    assert (site.status, site.spelling) == ("dense", "mha")


@pytest.mark.parametrize(("training", "words"), [(True, "dropout p=0.3"), (False, "no_grad")])
def test_training_keeps_the_call(training, words):
    attention = module(dropout=0.3).train(training)
    program = lambda x: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    before, after = codes_of(program, torch.randn(N, 2, E), grad=True)
    assert after == before
    assert words in mpass.last_report().sites[0].reason


def test_dropout_that_training_asks_for_is_told_without_gradients():
    attention = module(dropout=0.3).train()
    program = lambda x: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    before, after = codes_of(program, torch.randn(N, 2, E))
    assert after == before
    assert "dropout p=0.3" in mpass.last_report().sites[0].reason


def test_only_the_calls_that_become_sparse_are_replaced():
    first, second, third = module(), module(), module()

    def program(x):
        x = first(x, x, x, attn_mask=hidden(), need_weights=False)[0]
        x = second(x, x, x, attn_mask=hidden())[0]
        bias = x[:, 0, :1] * x[:, 0, :1].mT
        return third(x, x, x, attn_mask=bias, need_weights=False)[0]

    _, after = codes_of(program, torch.randn(N, 2, E), read_masks=False)
    assert after.count("multi_head_attention_forward(") == 2
    assert after.count("minference.sparse_attention") == 1
    assert "scaled_dot_product_attention" not in after
    statuses = [site.status for site in mpass.last_report().sites]
    assert statuses == ["sparse", "dense", "dense"]


def test_inputs_that_are_written_after_the_call_are_read_before():
    attention = module()

    def program(x):
        x, mask = x * 1.0, hidden()
        y = attention(x, x, x, attn_mask=mask, need_weights=False)[0]
        x.zero_()
        mask.fill_(True)
        return y + x

    check(program, torch.randn(N, 2, E))


def test_a_failure_of_opening_leaves_the_call_and_warns(monkeypatch):
    def breaks(call, arguments):
        call.graph.call_function(torch.neg, (arguments["query"],))
        raise ZeroDivisionError("on purpose")

    monkeypatch.setenv(failures.VARIABLE, "0")
    monkeypatch.setattr(failures, "_reported", set())
    monkeypatch.setattr("mpass.match.multi_head_attention.write_parts", breaks)
    attention = module()
    program = lambda x: attention(x, x, x, need_weights=False)[0]  # noqa: E731
    with pytest.warns(failures.InternalErrorWarning, match="opening attention"):
        before, after = codes_of(program, torch.randn(N, 2, E))
    assert after == before
    assert "on purpose" in mpass.last_report().sites[0].reason
