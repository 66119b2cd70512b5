"""Windows whose size a program is given: read, fixed by a guard, and right for each size."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import mpass
from tests.helpers.truth import dense_attention

OPTIONS = {"inner_backend": "eager", "min_seq_len": 64, "dense_above": 2.0}
OPTIONS |= {"pattern": "block_sparse(100)"}


def distances(q, k):
    return torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])


def both_ways(q, k, v, w):
    return distances(q, k).abs() <= w


def both_ways_below(q, k, v, w):
    return distances(q, k).abs() < w


def back_alone(q, k, v, w):
    away = distances(q, k)
    return (away >= 0) & (away < w)


def by_triangles(q, k, v, w):
    ones = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool)
    return ones.tril(w) & ones.triu(-w)


def one_more_ahead(q, k, v, w):
    """No window that is served: it reaches one key further ahead than back."""
    away = distances(q, k)
    return (away <= w) & (away >= -w - 1)


def half(q, k, v, w):
    """Of a size that depends on the length: a graph for each length would be too many."""
    return distances(q, k).abs() <= q.shape[2] // 2 - 50


MASKS = (both_ways, both_ways_below, back_alone, by_triangles)


def tensors(n):
    return torch.randn(3, 1, 2, n, 16, generator=torch.Generator().manual_seed(0)).unbind(0)


def run(make, calls, apart=False, **more):
    """The statuses of each call's site, in order, with every result held against fp64."""
    torch._dynamo.reset()

    def attention(q, k, v, w):
        return F.scaled_dot_product_attention(q, k, v, make(q, k, v, w))

    compiled = torch.compile(attention, backend="minference", options=OPTIONS | more)
    statuses = []
    for n, w in calls:
        inputs = tensors(n)
        mark = torch._dynamo.mark_dynamic if apart else torch._dynamo.maybe_mark_dynamic
        for tensor in inputs:  # apart: lengths have symbols of their own
            mark(tensor, 2)
        before = counters["minference"]["graphs"]
        found = compiled(*inputs, w)
        truth = dense_attention(*inputs, make(*inputs, w), 0.25)
        assert (found - truth).abs().max() < 1e-5, (n, w)
        (site,) = mpass.reports()[-1].sites
        statuses.append((site.status, counters["minference"]["graphs"] - before))
    return statuses


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("make", MASKS)
def test_window_of_a_given_size_is_sparse_and_has_a_graph_per_size(make, apart):
    statuses = run(make, [(200, 20), (300, 20), (200, 21), (250, 21), (200, 20)], apart)
    assert [status for status, _ in statuses] == ["sparse"] * 5
    assert [graphs for _, graphs in statuses] == [1, 0, 1, 0, 0]


@pytest.mark.parametrize("w", [2, 199, 200, 5000])
def test_window_of_any_size_is_exact(w):
    statuses = run(
        both_ways, [(200, 3), (200, w)]
    )  # Dynamo makes an integer symbolic at the second
    assert [status for status, _ in statuses] == ["sparse", "sparse"]


@pytest.mark.parametrize(("make", "second"), [(one_more_ahead, 1), (half, 0)])
def test_what_is_no_such_window_is_right(make, second):
    statuses = run(make, [(200, 20), (200, 21), (300, 22), (210, 23)], read_masks=False)
    assert statuses == [("dense", 1), ("dense", second), ("dense", 0), ("dense", 0)]
