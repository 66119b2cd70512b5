"""Gradients through every pattern: those of attention in fp64 over the cells that are computed."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpass.lowering.index import AttentionMask, SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.reference.attention import computed_mask
from mpass.patterns.base import registered_patterns
from mpass.patterns.base.layer import attention_arguments, group_heads
from tests.helpers.rotation import part_of_today
from tests.helpers.truth import dense_gradients, random_attention

PATTERNS = [
    pattern for _, cls in sorted(registered_patterns().items()) for pattern in cls.examples()
]
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
"""Of the norm of a gradient, for that of the difference."""


@st.composite
def calls(draw: st.DrawFn) -> tuple[AttentionInputs, torch.dtype]:
    dtype = draw(st.sampled_from(sorted(TOLERANCE, key=str)))
    num_queries, offset = draw(st.integers(2, 330)), draw(st.sampled_from([0, 0, 37, 64]))
    sizes = {"batch": draw(st.integers(1, 2)), "kv_heads": draw(st.sampled_from([1, 2, 4]))}
    lengths = {"num_queries": num_queries, "num_keys": num_queries + offset, "head_dim": 64}
    tensors = random_attention(**sizes, **lengths, dtype=dtype, seed=draw(st.integers(0, 999)))
    key_mask = None
    if draw(st.booleans()):
        key_mask = torch.ones(sizes["batch"], num_queries + offset, dtype=torch.bool)
        key_mask[0, : draw(st.integers(1, 40))] = False
    mask = AttentionMask(True, offset, draw(st.sampled_from([0, 0, 70])), key_mask)
    sinks = torch.linspace(-1, 1, 4) if draw(st.booleans()) else None
    return AttentionInputs(*tensors, mask, 0.125, sink_logits=sinks), dtype


@pytest.mark.parametrize("pattern", part_of_today(PATTERNS, share=8), ids=str)
@settings(max_examples=6)
@given(call=calls())
def test_gradients_are_those_of_the_cells_that_a_pattern_computes(pattern, call):
    inputs, dtype = call
    query, key, value, mask = inputs.query, inputs.key, inputs.value, inputs.mask
    heads = group_heads((pattern,) * 4, 4 // key.shape[1])
    leaves = [t.clone().requires_grad_() for t in (query, key, value)]
    sinks = None if inputs.sink_logits is None else inputs.sink_logits.clone().requires_grad_()
    with torch.no_grad():
        found = attention_arguments(
            *(query, key, value, heads, mask, inputs.scale, 0.0, sinks), *(2.0, 0, -1, 0)
        )
    arguments = [*leaves, *found[3:]]
    op = torch.ops.minference.sparse_attention_train.default
    out, _, dense = op(*arguments)
    assert not dense
    index = SparseIndex(*found[3:9], tuple(found[9]))
    sizes = {"batch": len(query), "num_queries": query.shape[2], "num_keys": key.shape[2]}
    cells = computed_mask(index, mask, **sizes)
    grad_out = torch.randn(out.shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    wanted = [*leaves, *([] if sinks is None else [sinks])]
    gradients = torch.autograd.grad(out, wanted, grad_out)
    for one, other in zip(gradients, dense_gradients(inputs, cells, grad_out), strict=True):
        assert (one.double() - other).norm() <= TOLERANCE[dtype] * other.norm() + 1e-6
