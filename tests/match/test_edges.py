"""Attention at its edges: scores of any size, batch rows without a key, arguments by name.

What is computed stays eager's; the patterns select every key.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import flex_attention

import mpass
from mpass.backend import minference
from mpass.graph.arguments import parameters_of
from mpass.match.sdpa import SdpaCall
from tests.helpers.eager_equal import (
    BIDIRECTIONAL,
    FULL,
    INF,
    H,
    N,
    attend,
    causal,
    compare,
    operands,
)
from tests.match.test_hostile import maximum_after_sinks

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


# -- scores of any size -----------------------------------------------------------------------


def whole_operands(exponent, dtype, rows):
    """Query, key and value whose scores are exact in fp32, and about 4 ** exponent."""
    q, k, v = operands()
    q, k = ((tensor * 2).round() * 2.0**exponent for tensor in (q, k))
    if rows == "mixed":
        q[:, :, ::2] *= 4.0**-exponent
    return [tensor.to(dtype) for tensor in (q, k, v)]


def written_out(q, k, v):
    scores = (q.float() @ k.float().mT * 0.25).masked_fill(~causal(), -INF)
    return (scores.softmax(-1) @ v.float()).to(q.dtype)


def with_sinks(q, k, v):
    return maximum_after_sinks(q, k, v, torch.linspace(-1, 1, H))


@pytest.mark.parametrize("rows", ["all", "mixed"])
@pytest.mark.parametrize("exponent", [6, 13, 20, 27, 50])
@pytest.mark.parametrize(
    ("program", "dtype"),
    [
        (attend, torch.float32),
        (attend, torch.bfloat16),
        (written_out, torch.float32),
        (with_sinks, torch.float32),
    ],
)
def test_huge_scores_are_those_of_eager(program, dtype, exponent, rows):
    tensors = whole_operands(exponent, dtype, rows)
    (site,) = compare(program, tensors=tensors, tolerance=1e-5 if dtype.itemsize == 4 else 0.02)
    assert site.status == "sparse", site.reason


# -- batch rows without a key, not causal -----------------------------------------------------


LOWEST = torch.finfo(torch.float32).min


def replaced(q, k, v, keep):
    return (q @ k.mT * 0.2).masked_fill(~keep[:, None, None], -1e9).softmax(-1) @ v


def chosen(q, k, v, keep):
    return torch.where(keep[:, None, None], q @ k.mT * 0.2, LOWEST).softmax(-1) @ v


def added(q, k, v, keep):
    bias = torch.zeros(keep.shape).masked_fill(~keep, LOWEST)[:, None, None]
    return (q @ k.mT * 0.2 + bias).softmax(-1) @ v


def given_to_sdpa(q, k, v, keep):
    bias = torch.zeros(keep.shape).masked_fill(~keep, LOWEST)[:, None, None]
    return F.scaled_dot_product_attention(q, k, v, bias.expand(-1, -1, N, -1))


def hidden_unlike(q, k, v, keep):
    scores = (q @ k.mT * 0.2).masked_fill(~keep[:, None, None], -1e9)
    return scores.masked_fill(torch.arange(N) >= N - 10, -1e12).softmax(-1) @ v


WITHOUT_KEYS = {
    "none": torch.tensor([0, N - 9]),
    "one": torch.tensor([0, N]),
    "all": torch.tensor([N, N]),
}
"""Keys that are padding, in each batch row."""


@pytest.mark.parametrize("missing", WITHOUT_KEYS)
@pytest.mark.parametrize(
    ("program", "status"),
    [
        (replaced, "sparse"),
        (chosen, "sparse"),
        (added, "sparse"),
        (given_to_sdpa, "sparse"),
        (hidden_unlike, "dense"),  # the mean of the first values
    ],
)
def test_batch_rows_without_a_key_are_those_of_eager(program, status, missing):
    tensors = [torch.cat([tensor, tensor.flip(2)]) for tensor in operands()]
    keep = torch.arange(N) >= WITHOUT_KEYS[missing][:, None]
    (site,) = compare(program, keep, pattern=BIDIRECTIONAL, tensors=tensors)
    assert site.status == status, site.reason
    words = "that see no key are"
    assert words in (site.reason if status == "dense" else " ".join(site.mask))


def test_batch_rows_without_a_key_keep_grouped_heads_under_functionalisation():
    q, k, v = (torch.cat([tensor, tensor.flip(2)]) for tensor in operands())
    keep = torch.arange(N) >= torch.tensor([[0], [N]])

    def program(q, k, v):
        return replaced(q, *(t.repeat_interleave(2, 1) for t in (k, v)), keep) * 2

    options = {"pattern": BIDIRECTIONAL, "min_seq_len": 16, "dense_above": 2.0}
    options["inner_backend"] = "aot_eager"
    with torch.no_grad():
        expected = program(q, k[:, :2], v[:, :2])
        out = torch.compile(program, backend="minference", options=options)(q, k[:, :2], v[:, :2])
    assert mpass.last_report().sites[0].status == "sparse"
    assert torch.allclose(out, expected, atol=1e-5)


# -- arguments by name ------------------------------------------------------------------------


def by_keyword(gm):
    """Give every argument of attention by keyword: graphs that are made by hand may."""
    for node in gm.graph.nodes:
        name = str(node.target)
        if node.op == "call_function" and "attention" in name:
            names = parameters_of(node.target) or tuple(vars(SdpaCall)["__annotations__"])
            node.kwargs = dict(zip(names, node.args, strict=False)) | node.kwargs
            node.args = ()


def words_for_attention(q, k, v):
    return torch.ops.minference.attention(q, k, v, None, None, 0, 0, True, 0.25, 0.0)


def flexible(q, k, v):
    return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: 5 * torch.tanh(s / 5))


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize(
    ("program", "pattern"),
    [(attend, FULL), (words_for_attention, FULL), (flexible, BIDIRECTIONAL)],
)
def test_attention_is_found_by_the_names_of_its_arguments(program, pattern):
    def backend(gm, example_inputs):
        by_keyword(gm)
        gm.recompile()
        options = {"pattern": pattern, "min_seq_len": 16, "dense_above": 2.0}
        return minference(gm, example_inputs, options={**options, "inner_backend": "eager"})

    with torch.no_grad():
        expected = program(*operands())
        out = torch.compile(program, backend=backend)(*operands())
    (site,) = mpass.last_report().sites
    assert site.status == "sparse", site.reason
    assert torch.allclose(out, expected, atol=2e-6)
