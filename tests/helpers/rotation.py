"""Parts of a matrix of cases: another one each day, so that all are run in a few days.

MPASS_SEED=0, 1, 2, ... chooses a day: `share` of them run a whole matrix.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import TypeVar

import pytest

T = TypeVar("T")

WITH_A_MODEL = ("accuracy floors", "demo", "page")
"""Tests of a real model that take half a minute or more of tracing and prefills each."""


def part_of_today(cases: Iterable[T], share: int) -> list[T]:
    """One case in `share`, in their order, others every day; MPASS_SEED chooses a day."""
    seed = int(os.environ.get("MPASS_SEED") or datetime.date.today().toordinal())
    return list(cases)[seed % share :: share]


def on_its_day(name: str) -> pytest.MarkDecorator:
    """Runs tests of WITH_A_MODEL on one day in three."""
    place = WITH_A_MODEL.index(name)
    today = part_of_today(range(len(WITH_A_MODEL)), len(WITH_A_MODEL)) == [place]
    return pytest.mark.skipif(not today, reason=f"another day's; MPASS_SEED={place} runs it")
