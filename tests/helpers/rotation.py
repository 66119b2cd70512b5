"""Parts of a matrix of cases: another one each day, so that all are run in a few days.

MPASS_SEED=0, 1, 2, ... chooses a day: `share` of them run a whole matrix.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def part_of_today(cases: Iterable[T], share: int) -> list[T]:
    """One case in `share`, in their order, others every day; MPASS_SEED chooses a day."""
    seed = int(os.environ.get("MPASS_SEED") or datetime.date.today().toordinal())
    return list(cases)[seed % share :: share]
