"""Functions that Dynamo gave up on, because they were compiled too often.

Dynamo tells about its recompile limit in its log alone, and runs what is over the limit without a
compiler. Its log is read while it is written, whatever becomes of the record.
"""

from __future__ import annotations

import logging
import weakref
from collections import deque
from dataclasses import dataclass
from typing import Any

from mpass.story.graphs import as_reference, find_owner, graphs_kept

LOGGER = "torch._dynamo.convert_frame"
START = "torch._dynamo hit config."
KEPT_LIMITS = 64


@dataclass(frozen=True, eq=False)
class LimitReached:
    """One function over the limit.

    name, value: the setting of torch._dynamo.config and its value; function: name and place; why:
    the guard that failed last; owner: the model that was called; number: graphs kept before.
    """

    name: str
    value: object
    function: str
    why: str
    owner: weakref.ref[Any] | None
    number: int


_reached: deque[LimitReached] = deque(maxlen=KEPT_LIMITS)


def watch(record: logging.LogRecord) -> bool:
    """Keep what a record of Dynamo's log says of a limit; the record is let through."""
    args = record.args
    if str(record.msg).startswith(START) and isinstance(args, tuple) and len(args) >= 4:
        name, value, function, why = args[:4]
        first = (str(why).strip().splitlines() or [""])[0]
        owner = as_reference(find_owner())
        _reached.append(LimitReached(str(name), value, str(function), first, owner, graphs_kept()))
    return True


def limits_reached(owner: object, since: int) -> list[LimitReached]:
    """The limits that a model reached after a number of graphs, each function once."""
    found: dict[str, LimitReached] = {}
    if owner is None:
        return []
    for limit in _reached:
        if limit.number >= since and limit.owner is not None and limit.owner() is owner:
            found[limit.function] = limit
    return list(found.values())


def watch_limits() -> None:
    """Begin to read Dynamo's log, if that has not begun."""
    logging.getLogger(LOGGER).addFilter(watch)
