"""What all tests share: the fixtures of more than one file, and time for property tests."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, settings
from torch._dynamo.utils import counters

from mpass import debug
from mpass.evaluate.tasks import Haystack, make_haystack
from tests.helpers.haystacks import STORY

# A failure of the passes is told to users and keeps attention dense: here it is an error.
os.environ.setdefault("MPASS_STRICT", "1")

# Property tests take the time that a busy machine gives them.
settings.register_profile("busy", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("busy")


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    """Nothing has been compiled or counted, nothing stays; random numbers start from seed 0."""
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


@pytest.fixture
def fresh_debug_warnings() -> None:
    """A debug folder that cannot be written is warned of once in a process: once in a test."""
    debug.warned_roots.cache_clear()


@pytest.fixture(scope="session")
def haystack() -> Haystack:
    """A story for evaluations to hide needles in."""
    return make_haystack("story", STORY)
