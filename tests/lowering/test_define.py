"""Ops are defined so that calls are cheap, and so that nothing goes wrong where nobody looks."""

from __future__ import annotations

import pytest
import torch

from mpass.errors import GradientError
from mpass.lowering.define import FUNCTIONS, define_op, fake_of, forget_op
from mpass.patterns.base import registered_patterns
from tests.helpers.op_functions import op_functions


@pytest.fixture
def twice():
    """An op of this test alone."""

    @define_op("twice_of_a_test", "(Tensor given, int[] numbers, int site=0) -> Tensor")
    def op(given, numbers, site=0):
        return given * sum(numbers)

    @fake_of("twice_of_a_test")
    def fake(given, numbers, site=0):
        return torch.empty_like(given)

    yield op
    forget_op("twice_of_a_test")


def test_an_op_computes_what_its_function_does(twice):
    given = torch.arange(4.0)
    assert torch.equal(twice(given, [1, 1]), given * 2)
    torch.library.opcheck(twice, (given, [1, 1]))


def test_an_op_survives_a_compiler(twice):
    given = torch.arange(4.0)
    compiled = torch.compile(lambda x: twice(x + 1, [1, 1]) + 1, fullgraph=True)
    assert torch.equal(compiled(given), (given + 1) * 2 + 1)


def test_an_op_may_be_defined_anew(twice):
    @define_op("twice_of_a_test", "(Tensor given) -> Tensor")
    def other(given):
        return given * 3

    assert torch.equal(other(torch.ones(2)), torch.full((2,), 3.0))


def test_an_input_that_needs_a_gradient_is_refused_at_once(twice):
    given = torch.ones(2, requires_grad=True)
    with pytest.raises(GradientError, match="twice_of_a_test"):
        twice(given, [1])
    with torch.no_grad():
        assert torch.equal(twice(given, [1]), torch.ones(2))


def test_no_gradient_flows_to_a_choice():
    """A backend that runs the graph as it is calls estimators where gradients are recorded."""

    @define_op("largest_of_a_test", "(Tensor given) -> Tensor", chooses=True)
    def op(given):
        return given.argmax(-1)

    chosen = op(torch.ones(2, 3, requires_grad=True))
    assert not chosen.requires_grad
    forget_op("largest_of_a_test")


def test_a_forgotten_op_is_gone(twice):
    forget_op("twice_of_a_test")
    assert not hasattr(torch.ops.minference, "twice_of_a_test")
    assert "twice_of_a_test" not in FUNCTIONS


def test_ops_of_patterns_pass_no_python_of_autograd():
    """Their lists of numbers, one per head and field, would be converted once more for each."""
    for name in (*registered_patterns(), "sparse_attention", "join_indexes"):
        assert name in op_functions()
        kernel = torch._C._dispatch_has_kernel_for_dispatch_key
        assert not kernel(f"minference::{name}", "Autograd")


@pytest.mark.parametrize(
    "name", ["read_mask", "masked_attention", "sparse_attention_steps", "sparse_attention_kv"]
)
def test_ops_that_ask_the_host_in_every_call_are_kept_out_of_cuda_graphs(name):
    op = getattr(torch.ops.minference, name).default
    assert torch.Tag.cudagraph_unsafe in op.tags
