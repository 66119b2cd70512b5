"""Query, key and value are those that the products saw, whatever is written before and after."""

from __future__ import annotations

import pytest

from tests.helpers.eager_equal import D, H, N, compare, hide

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def key_written_through_its_source(q, k, v):
    k = k * 1.0
    turned = k.transpose(-1, -2)
    scores = q @ turned * 0.2
    k.zero_()
    return hide(scores).softmax(-1) @ v


def key_restored_after_the_scores(q, k, v):
    turned = k.transpose(-1, -2).clone()
    turned.zero_()
    scores = q @ turned * 0.2
    turned.copy_(k.transpose(-1, -2))
    return hide(scores).softmax(-1) @ v


def repeated_key_written(q, k, v):
    k = k[:, :1] * 1.0
    turned = k.expand(1, H, N, D).mT
    scores = q @ turned * 0.2
    k.relu_()
    return hide(scores).softmax(-1) @ v


def query_restored_after_the_scores(q, k, v):
    heads_last = q.transpose(1, 2).clone()
    heads_last.mul_(-1)
    scores = heads_last.transpose(1, 2) @ k.mT * 0.2
    heads_last.copy_(q.transpose(1, 2))
    return hide(scores).softmax(-1) @ v


def value_written_before_the_product(q, k, v):
    heads_last = v.transpose(1, 2).clone()
    weights = hide(q @ k.mT * 0.2).softmax(-1)
    heads_last.mul_(-1)
    return weights @ heads_last.transpose(1, 2)


@pytest.mark.parametrize(
    "program",
    [
        key_written_through_its_source,
        key_restored_after_the_scores,
        repeated_key_written,
        query_restored_after_the_scores,
        value_written_before_the_product,
    ],
)
def test_operands_are_those_that_the_products_saw(program):
    """Without validation, which would notice: the matcher must not be wrong."""
    compare(program, validate="off")
