"""Sizes compared by guards: only where they agree now, and only where a guard holds."""

from __future__ import annotations

import pytest
import torch

from mpass.graph.nodes import is_tensor, shape_of
from mpass.graph.sizes import agree, holds

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def compare(ask, *lengths: int) -> tuple[list[bool], int]:
    """What `ask` says of the sizes of two tensors, and how many graphs all lengths make."""
    answers: list[bool] = []

    def backend(gm, _inputs):
        tensors = filter(is_tensor, gm.graph.find_nodes(op="placeholder"))
        first, second = (shape_of(node)[0] for node in tensors)
        answers.append(ask(first, second))
        return gm.forward

    run = torch.compile(lambda x, y: (x + 1, y + 1), backend=backend, dynamic=True)
    for length in lengths:
        run(torch.ones(4), torch.ones(length))
    return answers, len(answers)


@pytest.mark.parametrize(
    ("lengths", "answers", "graphs"),
    [
        ((4, 5), [True, False], 2),  # the guard sends other lengths to another graph
        ((5, 6, 7), [False], 1),  # what is false now limits nothing
    ],
)
def test_sizes_agree_by_a_guard_where_they_do_now(lengths, answers, graphs):
    assert compare(agree, *lengths) == (answers, graphs)


def test_a_condition_that_is_false_now_gets_no_guard():
    assert compare(lambda x, y: holds(x + 1 <= y, x, y), 3, 5) == ([False], 1)


def test_a_range_of_what_both_sizes_hold_is_no_obstacle():
    """New tokens whose number has a range, beside two caches of one length."""
    answers: list[bool] = []

    def backend(gm, _inputs):
        tensors = filter(is_tensor, gm.graph.find_nodes(op="placeholder"))
        new, keys, values = (shape_of(node)[0] for node in tensors)
        answers.append(agree(new + keys, new + values))
        answers.append(agree(new, keys))
        return gm.forward

    new = torch.ones(5)
    torch._dynamo.mark_dynamic(new, 0, min=2, max=64)
    run = torch.compile(lambda *x: [t + 1 for t in x], backend=backend, dynamic=True)
    run(new, torch.ones(5), torch.ones(5))
    assert answers == [True, False]  # a guard on the range itself would break the promise


def test_a_range_that_follows_from_a_table_of_positions_is_no_obstacle():
    """Learned positions of 64 tokens, of which those after a cache are looked up."""
    answers: list[bool] = []

    def backend(gm, _inputs):
        tensors = [shape_of(n) for n in gm.graph.find_nodes(op="placeholder") if is_tensor(n)]
        keys, values = (shape[0] for shape in tensors if len(shape) == 1)
        env = keys.node.shape_env
        answers.append(int(env.var_to_range[keys.node.expr].upper) <= 64)
        answers.append(agree(keys, values))
        return gm.forward

    def look_up(table, keys, values):
        return table[keys.shape[0] : keys.shape[0] + 3] + 1, keys + 1, values + 1

    table, keys, values = torch.ones(64, 2), torch.ones(5), torch.ones(5)
    torch._dynamo.mark_static(table)
    with torch.fx.experimental._config.patch(use_duck_shape=False):  # equal sizes, two symbols
        torch.compile(look_up, backend=backend, dynamic=True)(table, keys, values)
    assert answers == [True, True]


def test_no_guard_outside_of_dynamo():
    """An exported program has none, so nothing may depend on one."""
    n = torch.export.Dim("n")
    m = torch.export.Dim("m")
    program = torch.export.export(
        Two(),
        (torch.ones(4), torch.ones(4)),
        dynamic_shapes=({0: n}, {0: m}),
    )
    first, second = (shape_of(n)[0] for n in program.graph.find_nodes(op="placeholder"))
    assert not agree(first, second)


class Two(torch.nn.Module):
    def forward(self, x, y):
        return x + 1, y + 1
