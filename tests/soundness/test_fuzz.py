"""Programs composed at random, compiled with patterns that select every key, equal eager."""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, given, settings

from tests.soundness.programs import likely, programs, wrong


def examples(count):
    return settings(
        max_examples=count, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
    )


@examples(24)
@given(likely)
def test_random_programs_are_not_wrong(spec):
    assert wrong(spec) == ""


@pytest.mark.slow
@examples(2000)
@given(programs)
def test_many_random_programs_are_not_wrong(spec):
    assert wrong(spec) == ""


@pytest.mark.slow
@examples(300)
@given(likely)
def test_likely_programs_are_not_wrong(spec):
    assert wrong(spec) == ""


@pytest.mark.slow
@examples(200)
@given(programs)
def test_every_proof_of_random_programs_holds(spec):
    assert wrong(spec, validate="full") == ""
