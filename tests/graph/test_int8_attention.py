"""`options={"attention": "int8"}`: which attentions of a graph have scores in 8 bits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

import mpass
from mpass.backend import minference
from mpass.config.heads import read_groups
from mpass.errors import OptionValueError
from mpass.lowering.cpu import support
from mpass.lowering.index import AttentionMask
from mpass.options import parse_options
from mpass.patterns.base.layer import attention_arguments
from tests.helpers.cpu_cases import needs_kernels
from tests.helpers.toys import EVERY_KEY
from tests.helpers.truth import random_attention

NO_INT8 = support.int8_reason(torch.float32)
needs_int8 = pytest.mark.skipif(bool(NO_INT8), reason=f"no scores in 8 bits here: {NO_INT8}")
LENGTH = 256


def causal(query, key, value):
    return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)


def under_a_mask(query, key, value, mask):
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, enable_gqa=True)


def run(program, *inputs, **options):
    """What a program gives that was compiled with all keys kept, its report and its ops."""
    torch._dynamo.reset()
    seen: list[str] = []

    def backend(gm, example_inputs):
        chosen = {"inner_backend": "eager", "pattern": EVERY_KEY, "min_seq_len": 64}
        chosen |= {"dense_above": 2.0, "attention": "int8"} | options
        compiled = minference(gm, example_inputs, options=chosen)
        seen.extend(
            f"{node.target} {dict(node.kwargs)}"
            for node in gm.graph.nodes
            if "minference" in str(node.target)
        )
        return compiled

    out = torch.compile(program, backend=backend)(*inputs)
    return out, mpass.last_report(), seen


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


@needs_kernels
@needs_int8
@torch.no_grad()
def test_sparse_attention_multiplies_in_8_bits_and_says_so():
    inputs = random_attention(num_queries=LENGTH)
    out, report, seen = run(causal, *inputs)
    assert report.notes == ("1 of 1 sparse attentions with scores in 8 bits",)
    assert any("'int8': True" in each for each in seen)  # part of the key of compiled graphs
    assert 1e-4 < relative(out, causal(*inputs)) < 0.015
    exact, report, seen = run(causal, *inputs, attention=None)
    assert report.notes == ()
    assert not any("int8" in each for each in seen)
    assert relative(exact, causal(*inputs)) < 1e-5


@needs_kernels
@needs_int8
@torch.no_grad()
def test_masks_that_are_read_at_run_time_are_served():
    inputs = random_attention(num_queries=LENGTH)
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()[None, None]
    out, report, seen = run(under_a_mask, *inputs, mask)
    assert report.notes == ("1 of 1 sparse attentions with scores in 8 bits",)
    assert any("masked_attention" in each for each in seen)
    assert 1e-4 < relative(out, causal(*inputs)) < 0.015


@needs_kernels
@needs_int8
def test_attention_that_selects_keys_for_a_cache_is_served():
    query, key, value = random_attention(num_queries=LENGTH)
    heads = read_groups((EVERY_KEY,) * 4, 2)
    given = attention_arguments(
        *(query, key, value, heads, AttentionMask(), 0.2, 0.0, None), *(2.0, 0, 0, 0)
    )
    selecting = torch.ops.minference.sparse_attention_kv.default
    exact, rounded = (
        selecting(64, 32, 5, "avg", False, *given, int8=int8) for int8 in (False, True)
    )
    plain = torch.ops.minference.sparse_attention.default(*given, int8=True)
    assert torch.equal(rounded, plain)
    assert 1e-4 < relative(rounded, exact) < 0.015


@needs_kernels
def test_where_it_cannot_be_the_report_says_why(monkeypatch):
    monkeypatch.setattr(support, "int8_reason", lambda dtype: "no VNNI")
    inputs = random_attention(num_queries=LENGTH)
    with torch.no_grad():
        out, report, seen = run(causal, *inputs)
    assert report.notes == ("0 of 1 sparse attentions with scores in 8 bits (1 not: no VNNI)",)
    assert not any("int8" in each for each in seen)
    assert relative(out, causal(*inputs)) < 1e-5


@torch.no_grad()
def test_fp64_stays_dense():
    inputs = [each.double() for each in random_attention(num_queries=LENGTH)]
    out, report, _ = run(causal, *inputs)
    assert "float64" in report.sites[0].reason
    assert relative(out, causal(*inputs)) < 1e-10


def test_summaries_are_exact():
    inputs = random_attention(num_queries=LENGTH)

    def both_ways(query, key, value):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)

    with torch.no_grad():
        _, report, _ = run(both_ways, *inputs, pattern="block_sparse(2, 64)", summaries=16)
    assert "'summaries' needs exact sums" in report.notes[0]


@pytest.mark.parametrize("value", ["int4", True, 8])
def test_other_values_are_refused(value):
    with pytest.raises(OptionValueError, match="attention"):
        parse_options(None, {"attention": value})


def test_training_is_refused():
    with pytest.raises(OptionValueError, match="training"):
        parse_options(None, {"attention": "int8", "training": "sparse"})
