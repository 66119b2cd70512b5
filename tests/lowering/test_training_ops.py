"""Gradients of attention over an index: plain torch against autograd over the computed cells."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mpass.lowering.training_ops  # noqa: F401  (defines the ops)
from mpass.lowering.index import AttentionMask, IndexWidth, SparseIndex
from mpass.lowering.inputs import AttentionInputs
from mpass.lowering.lse_ops import every_key
from mpass.lowering.reference import attention as reference
from mpass.lowering.reference.backward import ForwardResult, attention_backward, sink_gradient
from tests.helpers.triton_cases import SLOTS, padding, random_index
from tests.helpers.truth import dense_gradients, random_attention

WIDTH = IndexWidth(max_blocks=2, max_diagonals=2, max_columns=40)


def arguments(inputs: AttentionInputs, index: SparseIndex, dense_above: float = 1.0) -> list:
    """The arguments of the op."""
    mask = inputs.mask
    return [
        *(inputs.query, inputs.key, inputs.value, *index.tensors(), list(index.head_slots)),
        *(mask.key_mask, inputs.sink_logits, mask.query_offset, mask.window, mask.causal),
        *(inputs.scale, inputs.softcap, dense_above, 0, -1, 0),
    ]


@st.composite
def cases(draw: st.DrawFn) -> tuple[AttentionInputs, SparseIndex, dict[str, int]]:
    causal = draw(st.booleans())
    num_queries, batch = draw(st.integers(1, 150)), draw(st.integers(1, 2))
    offset = draw(st.sampled_from([0, 0, 37, 64])) if causal else 0
    num_keys = num_queries + offset + draw(st.sampled_from([0, 0, 21]))
    window = draw(st.sampled_from([0, 0, 9, 70])) if causal else 0
    key_mask = padding(batch, num_keys) if draw(st.booleans()) and num_keys > 5 else None
    mask = AttentionMask(causal, offset, window, key_mask)
    slots = SLOTS[draw(st.sampled_from(sorted(SLOTS)))] if causal else SLOTS["lists"]
    sizes = {"batch": batch, "num_queries": num_queries, "num_keys": num_keys}
    seed = draw(st.integers(0, 1000))
    index = random_index(slots, mask, width=WIDTH, seed=seed, **sizes)
    tensors = random_attention(
        batch, 4, draw(st.sampled_from([1, 2, 4])), num_queries, num_keys, 8, 6, torch.float64, seed
    )
    softcap = draw(st.sampled_from([0.0, 1.5]))
    sinks = torch.linspace(-1, 2, 4).double() if draw(st.booleans()) else None
    scale = draw(st.sampled_from([0.3, -0.2]))
    inputs = AttentionInputs(*tensors, mask, scale, softcap, sinks)
    if draw(st.booleans()):
        index = every_key(inputs)
    return inputs, index, sizes


@settings(max_examples=60)
@given(cases())
def test_gradients_in_plain_torch_equal_autograd_over_the_computed_cells(case):
    inputs, index, sizes = case
    cells = reference.computed_mask(index, inputs.mask, **sizes)
    out, lse = reference.sparse_attention_lse(inputs, index)
    grad_out = torch.randn(out.shape, dtype=torch.float64)
    result = ForwardResult(grad_out, out, lse)
    found = [*attention_backward(inputs, index, result)]
    found += [] if inputs.sink_logits is None else [sink_gradient(inputs, result)]
    for one, expected in zip(found, dense_gradients(inputs, cells, grad_out), strict=True):
        assert torch.allclose(one, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("form", ["lists", "diagonals"])
def test_the_op_passes_gradcheck(form):
    """In fp64, which plain torch serves: finite differences of the very op of graphs."""
    mask = AttentionMask(query_offset=5, window=60, key_mask=padding(1, 75))
    sizes = {"batch": 1, "num_queries": 70, "num_keys": 75}
    index = random_index(SLOTS[form], mask, width=WIDTH, **sizes)
    tensors = random_attention(1, 4, 2, 70, 75, 3, 2, torch.float64)
    sinks = torch.linspace(-1, 2, 4).double()
    inputs = AttentionInputs(*tensors, mask, 0.3, 1.5, sinks)
    rest = arguments(inputs, index)

    def attend(query, key, value, sinks):
        given = [query, key, value, *rest[3:]]
        given[11] = sinks
        return torch.ops.minference.sparse_attention_train.default(*given)[0]

    leaves = [t.clone().requires_grad_() for t in (*tensors, sinks)]
    assert torch.autograd.gradcheck(attend, leaves, fast_mode=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_ops_pass_opcheck(dtype):
    mask = AttentionMask()
    sizes = {"batch": 1, "num_queries": 130, "num_keys": 130}
    index = random_index(SLOTS["mixed"], mask, width=WIDTH, **sizes)
    tensors = [t.requires_grad_() for t in random_attention(1, 4, 2, 130, 130, 16, dtype=dtype)]
    inputs = AttentionInputs(*tensors, mask, 0.3, sink_logits=torch.zeros(4, requires_grad=True))
    given = arguments(inputs, index)
    torch.library.opcheck(torch.ops.minference.sparse_attention_train.default, given)
    given = [g.detach() if isinstance(g, torch.Tensor) else g for g in given]
    results = torch.ops.minference.sparse_attention_train.default(*given)
    backward = torch.ops.minference.sparse_attention_backward.default
    torch.library.opcheck(backward, (torch.ones_like(results[0]), *results, *given[:17]))
    assert not results[2]


def test_what_ran_dense_has_the_gradients_of_dense_attention():
    """Whatever decided in the forward pass, backward computes the same cells."""
    mask = AttentionMask()
    sizes = {"batch": 1, "num_queries": 200, "num_keys": 200}
    index = random_index(SLOTS["lists"], mask, width=WIDTH, **sizes)
    tensors = [t.requires_grad_() for t in random_attention(1, 4, 2, 200)]
    inputs = AttentionInputs(*tensors, mask, 0.2)
    op = torch.ops.minference.sparse_attention_train.default
    out, _, dense = op(*arguments(inputs, index, dense_above=0.0))
    assert dense
    grad_out = torch.randn(out.shape)
    found = torch.autograd.grad(out, tensors, grad_out)
    cells = torch.ones(200, 200, dtype=torch.bool).tril()[None, None]
    for one, expected in zip(found, dense_gradients(inputs, cells, grad_out), strict=True):
        assert torch.allclose(one.double(), expected, rtol=1e-4, atol=1e-5)
