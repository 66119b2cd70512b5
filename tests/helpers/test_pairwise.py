"""Pairwise cases: every pair that exists is met, by few cases."""

from __future__ import annotations

import itertools

import pytest

from tests.helpers.pairwise import pairwise, value_pairs

VALUES = [("a", "b", "c", "d", "e"), (1, 2, 3), (0.5, 1.5, 2.5), (True, False), ("x", "y", "z")]


def no_third(*case: object) -> bool:
    return not (case[0] == "a" and case[1] == 3)


@pytest.mark.parametrize("allowed", [lambda *case: True, no_third], ids=["all", "not all"])
def test_every_pair_that_exists_is_met_by_cases_that_exist(allowed) -> None:
    product = [case for case in itertools.product(*VALUES) if allowed(*case)]
    cases = pairwise(*VALUES, allowed=allowed)
    assert set(cases) <= set(product)
    assert set().union(*map(value_pairs, cases)) == set().union(*map(value_pairs, product))
    # The two longest parameters alone have 15 pairs.
    assert len(cases) < 25 < len(product)


def test_two_parameters_are_their_product() -> None:
    assert sorted(pairwise("ab", "xyz")) == sorted(itertools.product("ab", "xyz"))
