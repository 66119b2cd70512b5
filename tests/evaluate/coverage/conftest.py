"""What the tests of coverage share."""

from __future__ import annotations

import dataclasses

import pytest

from mpass.lowering import dispatch
from mpass.lowering.cpu import LOWERING


@pytest.fixture
def plain_torch(monkeypatch):
    """No kernels are compiled: what is tested is which graphs are rewritten, and into what."""
    serves_nothing = dataclasses.replace(LOWERING, serves=lambda _inputs: "plain torch, for tests")
    monkeypatch.setitem(dispatch._added, LOWERING.device, serves_nothing)
